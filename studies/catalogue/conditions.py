"""Conditions on a table, read safely: a few kinds of expression are computed here, everything else is refused.

Nothing is handed to `eval`: a condition comes from a command line or a web page, and may only look at columns.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ...errors import DeclarationError, UnknownNameError, choices, whole

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 2000
"""Characters of a condition."""
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
COMPARISONS = {**ORDER, ast.Eq: operator.eq, ast.NotEq: operator.ne}
POSSIBLE = "comparisons, and, or, not, in, arithmetic, numbers and quoted text"


class Value(NamedTuple):
    """A column or constant: `kind` is number, text, truth, date or mixed; `data` an array or a scalar."""

    kind: str
    data: Any


def ask(
    frame: pd.DataFrame,
    *,
    where: str | None = None,
    sort: str | Sequence[str] | None = None,
    top: int | None = None,
) -> pd.DataFrame:
    """The rows that meet a condition, sorted, the first few of them.

    Parameters
    ----------
    frame : DataFrame
    where : str, optional
        A condition on columns, such as ``"effect > 0.5 and layer >= 4"``, ``"head in (1, 2)"`` or
        ``"not (ablation == 'zero')"``. A missing value meets no comparison but ``!=``.
    sort : str or sequence of str, optional
        Columns, the first one first; a minus in front sorts from large to small. One text may hold several, with
        commas. Missing values come last.
    top : int, optional
        How many rows to keep.

    Raises
    ------
    DeclarationError
        A condition that cannot be meant or is not allowed: the text says where, and which columns exist.
    UnknownNameError
        A column to sort by that does not exist.
    """
    if top is not None:
        top = whole(top, "top, the number of rows,", low=1)
    if where is not None and where.strip():
        frame = frame[matching(frame, where)]
    if sort:
        frame = _sorted(frame, sort)
    return (frame if top is None else frame.head(top)).reset_index(drop=True)


def matching(frame: pd.DataFrame, where: str) -> np.ndarray[Any, Any]:
    """Which rows of `frame` meet the condition `where`, as booleans; see `ask`."""
    text = where.strip()
    reader = _Reader(text, frame)
    try:
        value = reader.value(_parsed(text, reader))
    except RecursionError:
        raise DeclarationError(f"where={_short(text)!r} is nested too deeply") from None
    if value.kind != "truth":
        raise DeclarationError(f"where={_short(text)!r} is no condition but a {value.kind}: compare it with something")
    return np.broadcast_to(np.asarray(value.data, dtype=bool), len(frame)).copy()


def _parsed(text: str, reader: _Reader) -> ast.expr:
    if len(text) > LONGEST:
        raise DeclarationError(f"where has {len(text)} characters: at most {LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.replace("\n", " "), mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        at = f", character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        said = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise DeclarationError(
            f"where={_short(text)!r}{at}: {said}; write a condition on the columns {choices(reader.columns)}"
        ) from None


class _Reader:
    """Computes the expressions that are allowed on the columns of a table."""

    def __init__(self, text: str, frame: pd.DataFrame) -> None:
        self.text = text
        self.frame = frame
        self.columns = [str(name) for name in frame.columns]

    def value(self, node: ast.expr) -> Value:
        """What `node` stands for; refuses kinds of expression that are not listed here."""
        match node:
            case ast.Constant():
                return self._constant(node)
            case ast.Name(id=name):
                if name not in self.columns:
                    self.refuse(node, f"there is no column {name!r}")
                return column_value(self.frame[name])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Value("truth", np.logical_not(self._truth(operand)))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                data = self._number(operand)
                return Value("number", -data if isinstance(sign, ast.USub) else data)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                with np.errstate(all="ignore"):
                    one, two = np.float64(self._number(left)), np.float64(self._number(right))
                    return Value("number", ARITHMETIC[type(op)](one, two))
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                self.refuse(node, "& and | are not read: write and, or")
            case ast.BoolOp(op=op, values=values):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                truths = [self._truth(one) for one in values]
                whole_truth = truths[0]
                for truth in truths[1:]:
                    whole_truth = join(whole_truth, truth)
                return Value("truth", whole_truth)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._chain(left, ops, others)
        self.refuse(node, f"{_named(node)} is not allowed")

    def _constant(self, node: ast.Constant) -> Value:
        match node.value:
            case bool():
                return Value("truth", np.bool_(node.value))
            case int() | float():
                try:
                    return Value("number", np.float64(node.value))
                except OverflowError:
                    self.refuse(node, "this number is too large")
            case str():
                return Value("text", node.value)
        self.refuse(node, f"{_short(repr(node.value))} is not allowed")

    def _truth(self, node: ast.expr) -> Any:
        value = self.value(node)
        if value.kind != "truth":
            self.refuse(node, f"a condition must stand here, not a {value.kind}")
        return value.data

    def _number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if value.kind != "number":
            self.refuse(node, f"a number must stand here, not a {value.kind}")
        return value.data

    def _chain(self, left: ast.expr, ops: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> Value:
        """``1 <= layer < 5``: each neighbour compared, and all of it true."""
        found: Any = np.bool_(True)
        for op, right in zip(ops, others, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                inside = self._inside(left, right)
                one = np.logical_not(inside) if isinstance(op, ast.NotIn) else inside
            elif type(op) in COMPARISONS:
                one = self._compared(left, op, right)
            else:
                self.refuse(right, "is does not compare columns: write == or !=")
            found = np.logical_and(found, one)
            left = right
        return Value("truth", found)

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        one, two = self.value(left), self.value(right)
        kinds = {one.kind, two.kind}
        if kinds == {"date", "text"}:
            one, two = self._as_date(left, one), self._as_date(right, two)
        elif len(kinds) > 1 and "mixed" not in kinds:
            self.refuse(right, f"a {one.kind} cannot be compared with a {two.kind}")
        if type(op) in ORDER and kinds & {"truth", "mixed"}:
            self.refuse(right, f"values of kind {choices(sorted(kinds))} have no order: use == or !=")
        with np.errstate(invalid="ignore"):
            return COMPARISONS[type(op)](one.data, two.data)

    def _as_date(self, node: ast.expr, value: Value) -> Value:
        if value.kind == "date":
            return value
        import pandas as pd

        try:
            return Value("date", pd.Timestamp(value.data).tz_localize(None).to_datetime64())
        except (ValueError, TypeError, OverflowError):
            self.refuse(node, f"{_short(str(value.data))!r} is no date: write one like '2026-01-31'")

    def _inside(self, left: ast.expr, right: ast.expr) -> Any:
        one = self.value(left)
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            within = self.value(right)
            if one.kind == "text" and isinstance(one.data, str) and within.kind == "text":
                return _elementwise(lambda text: one.data in text, within.data)
            self.refuse(right, "in takes a list, such as (1, 2, 3), or looks for text in a column of text")
        members = [self.value(item) for item in right.elts]
        for item, member in zip(right.elts, members, strict=True):
            if np.ndim(member.data):
                self.refuse(item, "a list holds numbers and text, no columns")
            if member.kind != one.kind and one.kind != "mixed":
                self.refuse(item, f"a {one.kind} cannot be compared with a {member.kind}")
        known = {member.data for member in members}
        return _elementwise(lambda value: value in known, one.data)

    def refuse(self, node: ast.expr, why: str) -> NoReturn:
        """One line that says where in the condition, why, and what is possible."""
        at = len(self.text.encode()[: node.col_offset].decode(errors="ignore")) + 1
        raise DeclarationError(
            f"where={_short(self.text)!r}, character {at}: {why}; possible are {POSSIBLE}, and the columns "
            f"{choices(self.columns)}"
        )


def column_value(series: pd.Series) -> Value:
    """A column with its kind. Whole numbers become floating-point ones, so that no arithmetic overflows."""
    kind = getattr(series.dtype, "kind", "O")
    if kind == "b":
        return Value("truth", series.fillna(False).to_numpy(dtype=bool))
    if kind in "iuf":
        return Value("number", series.to_numpy(dtype=np.float64, na_value=np.nan))
    if kind == "M":
        return Value("date", series.to_numpy(dtype="datetime64[us]"))
    values = series.to_numpy(dtype=object)
    missing = series.isna().to_numpy()
    values = np.where(missing, "", values)
    return Value("text" if all(isinstance(value, str) for value in values) else "mixed", values)


def _elementwise(test: Callable[[Any], bool], data: Any) -> Any:
    if np.ndim(data) == 0:
        return np.bool_(test(data))
    return np.fromiter((test(value) for value in data), dtype=bool, count=len(data))


def _sorted(frame: pd.DataFrame, sort: str | Iterable[str]) -> pd.DataFrame:
    wanted = sort.split(",") if isinstance(sort, str) else list(sort)
    names = [name.strip() for name in wanted if name.strip()]
    columns = [name.removeprefix("-") for name in names]
    for name in columns:
        if name not in frame.columns:
            raise UnknownNameError(f"sort={name!r}: there are the columns {choices(frame.columns)}")
    rising = [not name.startswith("-") for name in names]
    try:
        return frame.sort_values(columns, ascending=rising, kind="stable", na_position="last")
    except TypeError:
        raise DeclarationError(f"sort={', '.join(columns)}: numbers and text in one column have no order") from None


NAMES = {
    ast.Call: "a call",
    ast.Attribute: "an attribute",
    ast.Subscript: "a subscript",
    ast.Lambda: "a lambda",
    ast.IfExp: "an if",
    ast.Starred: "a star",
    ast.NamedExpr: "an assignment",
    ast.Tuple: "a list outside of in",
    ast.List: "a list outside of in",
    ast.Set: "a list outside of in",
}


def _named(node: ast.expr) -> str:
    return NAMES.get(type(node), f"an expression of the kind {type(node).__name__}")


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

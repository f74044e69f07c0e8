"""Conditions on a table: a few kinds of expression are computed here, everything else is refused.

Nothing is handed to `eval`: a condition comes from a command line or a web page, and may only look at columns.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ...errors import DeclarationError, UnknownNameError, choices, whole

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 2000
"""Characters of a condition."""
ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = ORDER | {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.And: np.logical_and,
    ast.Or: np.logical_or,
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.FloorDiv: np.floor_divide,
    ast.Mod: np.mod,
    ast.Pow: np.power,
}
KINDS = {"b": "truth", "f": "number", "M": "date"}
"""What values are, by the kind of their NumPy type; those of type object are text, or mixed."""
LISTS = (ast.Tuple, ast.List, ast.Set)
NAMES = {
    ast.Call: "a call",
    ast.Attribute: "an attribute",
    ast.Subscript: "a subscript",
    ast.IfExp: "an if",
    ast.NamedExpr: "an assignment",
    **dict.fromkeys(LISTS, "a list outside of in"),
}
POSSIBLE = "comparisons, and, or, not, in, arithmetic, numbers and quoted text"


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

    Returns
    -------
    DataFrame

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
    try:
        with np.errstate(all="ignore"):
            found = _Reader(text, frame).values(_parsed(text, frame))
    except RecursionError:
        raise DeclarationError(f"where={_short(text)!r} is nested too deeply") from None
    if (kind := _kind(found)) != "truth":
        raise DeclarationError(f"where={_short(text)!r} is no condition but a {kind}: compare it with something")
    return np.broadcast_to(found, len(frame)).copy()


def _parsed(text: str, frame: pd.DataFrame) -> ast.expr:
    if len(text) > LONGEST:
        raise DeclarationError(f"where has {len(text)} characters: at most {LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.replace("\n", " "), mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        at = f", character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        reason = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise DeclarationError(
            f"where={_short(text)!r}{at}: {reason}; write a condition on the columns {choices(frame.columns)}"
        ) from None


class _Reader:
    """Computes the expressions that are allowed on the columns of a table, as arrays with one value or one a row."""

    def __init__(self, text: str, frame: pd.DataFrame) -> None:
        self.text, self.frame = text, frame

    def values(self, node: ast.expr, needed: str | None = None) -> Any:
        """What `node` stands for, of the kind that is `needed`; refuses expressions that are not listed here."""
        found = self._values(node)
        if needed and _kind(found) != needed:
            what = "condition" if needed == "truth" else needed
            self.refuse(node, f"a {what} must stand here, not a {_kind(found)}")
        return found

    def _values(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() as text):
                return np.array(text, dtype=object)
            case ast.Constant(value=bool() as truth):
                return np.array(truth)
            case ast.Constant(value=int() | float() as number):
                try:
                    return np.array(float(number))
                except OverflowError:
                    self.refuse(node, "this number is too large")
            case ast.Constant(value=other):
                self.refuse(node, f"{_short(repr(other))} is not allowed")
            case ast.Name(id=name) if name in self.frame.columns:
                return column_values(self.frame[name])
            case ast.Name(id=name):
                self.refuse(node, f"there is no column {name!r}")
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return np.logical_not(self.values(operand, "truth"))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.values(operand, "number")
                return -number if isinstance(sign, ast.USub) else number
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                self.refuse(node, "& and | are not read: write and, or")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self.values(left, "number"), self.values(right, "number"))
            case ast.BoolOp(op=op, values=parts):
                found = self.values(parts[0], "truth")
                for part in parts[1:]:
                    found = OPERATORS[type(op)](found, self.values(part, "truth"))
                return found
            case ast.Compare(left=left, ops=ops, comparators=others):
                pairs = zip([left, *others], ops, others, strict=False)  # 1 <= layer < 5: each with its neighbour
                return np.logical_and.reduce(np.broadcast_arrays(*(self._compared(*pair) for pair in pairs)))
        self.refuse(node, f"{NAMES.get(type(node), f'an expression of the kind {type(node).__name__}')} is not allowed")

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            inside = self._inside(left, right)
            return inside if isinstance(op, ast.In) else np.logical_not(inside)
        if type(op) not in OPERATORS:
            self.refuse(right, "is does not compare columns: write == or !=")
        return self._by(OPERATORS[type(op)], self.values(left), right, self.values(right))

    def _by(self, compare: Callable[[Any, Any], Any], one: Any, node: ast.expr, two: Any) -> Any:
        kinds = {_kind(one), _kind(two)}
        if kinds == {"date", "text"}:
            one, two = self._date(node, one), self._date(node, two)
        elif len(kinds) > 1 and "mixed" not in kinds:
            self.refuse(node, f"a {_kind(one)} cannot be compared with a {_kind(two)}")
        if compare in ORDER.values() and kinds & {"truth", "mixed"}:
            self.refuse(node, f"values of kind {choices(sorted(kinds))} have no order: use == or !=")
        one, two = (one.astype(object), two.astype(object)) if "mixed" in kinds else (one, two)
        return np.asarray(compare(one, two), dtype=bool)

    def _date(self, node: ast.expr, values: Any) -> Any:
        if _kind(values) == "date":
            return values
        import pandas as pd

        try:
            return np.array(pd.Timestamp(values.item()).tz_localize(None).to_datetime64())
        except (ValueError, TypeError, OverflowError):
            self.refuse(node, f"{_short(str(values))!r} is no date: write one like '2026-01-31'")

    def _inside(self, left: ast.expr, right: ast.expr) -> Any:
        one = self.values(left)
        if isinstance(right, LISTS):
            members = [self.values(item) for item in right.elts]
            for item, member in zip(right.elts, members, strict=True):
                if member.ndim:
                    self.refuse(item, "a list holds numbers and text, no columns")
            found = [self._by(operator.eq, one, item, two) for item, two in zip(right.elts, members, strict=True)]
            return np.any(found, axis=0) if found else np.zeros(one.shape, bool)
        within = self.values(right)
        if _kind(one) == _kind(within) == "text" and not one.ndim:
            return np.array([one.item() in text for text in within.flat], dtype=bool).reshape(within.shape)
        self.refuse(right, "in takes a list, such as (1, 2, 3), or looks for text in a column of text")

    def refuse(self, node: ast.expr, why: str) -> NoReturn:
        """One line that says where in the condition, why, and what is possible."""
        at = len(self.text.encode()[: node.col_offset].decode(errors="ignore")) + 1
        raise DeclarationError(
            f"where={_short(self.text)!r}, character {at}: {why}; possible are {POSSIBLE}, and the columns "
            f"{choices(self.frame.columns)}"
        )


def _kind(values: Any) -> str:
    text = all(isinstance(one, str) for one in values.flat) if values.dtype.kind == "O" else False
    return "text" if text else KINDS.get(values.dtype.kind, "mixed")


def column_values(series: pd.Series) -> Any:
    """The values of a column. Whole numbers become floating-point ones, so that no arithmetic overflows."""
    kind = getattr(series.dtype, "kind", "O")
    if kind == "b":
        return series.fillna(False).to_numpy(dtype=bool)
    if kind in "iuf":
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    if kind == "M":
        return series.to_numpy(dtype="datetime64[us]")
    return np.where(series.isna(), "", series.to_numpy(dtype=object))


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


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

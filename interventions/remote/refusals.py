"""What a server's refusals mean, in a line that says what to do. Knows texts and codes; a leaf."""

from __future__ import annotations

import re

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same question may do."""
UNSURE = (408, 500, 502, 504)
"""Answers after which a job may have been taken all the same: of whatever stands between, or of a fault on the way."""
SHOWN = 300
"""Characters of a server's reason that are shown."""
READ = 16_000
"""Characters of what a server says that are looked at: the first half of them, and the last."""
HIDDEN = re.compile(r"<!--.*?-->|<(style|script)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
TAG = re.compile(r"<[^<>]*>")
RAISED = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt|Iteration|Warning)(: .*)?")
LACKING = re.compile(r"No module named ['\"]([\w.]+)['\"]")
LOGIN = "get one at https://login.ndif.us, then run `nnsight login` or set NDIF_API_KEY"


def is_passing(code: int) -> bool:
    """Whether asking again may do."""
    return code in PASSING


def may_be_taken(code: int) -> bool:
    """Whether the server may have a job that it answered so."""
    return code in UNSURE


def shortened(text: str) -> str:
    """A text without its middle, where it is longer than anybody reads."""
    return text if len(text) <= READ else f"{text[: READ // 2]}\n...\n{text[-READ // 2 :]}"


def without_key(text: str, key: str | None) -> str:
    """A text without the key, which servers quote."""
    return text.replace(key, "<key>") if key else text


def is_key(text: str) -> bool:
    """Whether a text can be sent as a key."""
    return text.isascii() and text.isprintable() and " " not in text


def explain_key(host: str) -> str:
    """What is said of a key that cannot be sent; never the key."""
    return (
        f"the key that nnsight found cannot be sent to {host}: it holds a space, a line break, or a quote or letter "
        "that is not plain ASCII; run `nnsight login`, or set NDIF_API_KEY to the key and nothing else"
    )


def explain_clear(host: str, allow: str) -> str:
    """What is said of a key that anybody between here and the server could read."""
    return (
        f"the key that nnsight found would go to {host} in clear, for everybody on the way to read: write its address "
        f"with https://, or, where the network between is trusted, set {allow}=1"
    )


def explain_unreached(host: str, why: str, key: str | None) -> str:
    """What is said of a server that does not answer the first question."""
    return (
        f"{host} cannot be reached: {why}; see whether this machine is on the network and NDIF_HOST names a server "
        "that is there" + ("" if key else f"; nnsight found no key either: {LOGIN}")
    )


def one_line(text: str, key: str | None) -> str:
    """The first line of what is said, without the key and without the tags of a web page."""
    text = shortened(text)
    if _is_page(text):
        text = TAG.sub("\n", HIDDEN.sub("", text))
    lines = [line.strip() for line in without_key(text, key).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:SHOWN] if lines else ""


def first_line(error: BaseException, key: str | None) -> str:
    """What an error says, in a line."""
    return one_line(str(error), key) or type(error).__name__


def explain_refusal(host: str, name: str, code: int, detail: str, key: str | None) -> str:
    """Say what an answer with an error code means, and what to do.

    Parameters
    ----------
    host : str
        Address of the server.
    name : str
        Of the model.
    code : int
        HTTP status.
    detail : str
        What the server says beside it.
    key : str, optional
        That nnsight found; it is left out of the text.

    Returns
    -------
    str
        One line.
    """
    reason = f"{one_line(detail, key) or 'it gives no reason'} ({code})"
    between = _is_page(detail) or "\n" in detail.strip()  # NDIF itself says one line
    if not between and (code in (401, 403) or _says(reason, "api key")):
        what = "refuses the key that nnsight found" if key else "wants a key, and nnsight found none"
        return f"{host} {what}: {reason}; {LOGIN}"
    if _says(reason, "version", "versions"):
        return f"{host} does not take what this machine runs: {reason}; `print(nnsight.compare())` shows where"
    if code == 413:
        return f"{host} takes no job as large as this: {reason}; give a smaller batch_size"
    if between:
        return f"{host}, or what stands before it, refuses a job on {name}: {reason}; does NDIF_HOST name the server?"
    return f"{host} refuses a job on {name}: {reason}"


def explain_failure(host: str, name: str, description: str) -> str:
    """What the description of a failed job means: a sentence of the server's own, or a traceback of the job."""
    of_job = description.lstrip().startswith("Traceback")
    reason = (_raised(description) if of_job else one_line(description, None)) or "it gives no reason"
    if lacking := LACKING.search(reason):
        module = lacking[1].partition(".")[0]
        return (
            f"a job on {name} failed on {host}: {reason}; put what a function needs of {module} into the function "
            f"itself, or send the module along with `nnsight.register({module!r})`"
        )
    if (of_job and "PersistentId" in reason) or (not of_job and _says(reason, "model architecture", "no module at")):
        return f"{name} is built otherwise on {host}: {reason}; other versions; see `print(nnsight.compare())`"
    if of_job:
        return f"a job on {name} failed on {host}: {reason}"
    if _says(reason, "could not deploy", "starting model", "provisioning model", "not found for"):
        return f"{name} cannot be had on {host}: {reason}; `print(nnsight.status())` lists the models that can"
    if _says(reason, "execution timeout"):
        return f"{host} stopped a job on {name}: {reason}; give a smaller batch_size"
    if _says(reason, "try again later", "cancelled"):
        return f"{host} did not run a job on {name}: {reason}; the same call goes on from what was finished"
    return f"a job on {name} failed on {host}: {reason}"


def is_memory(description: str) -> bool:
    """Whether a job failed for want of memory."""
    low = description.lower()
    return "out of memory" in low or "outofmemory" in low or "can't allocate memory" in low


def _is_page(text: str) -> bool:
    return text.lstrip().startswith("<")


def _says(reason: str, *words: str) -> bool:
    """Whether a reason holds one of these, as whole words."""
    return any(re.search(rf"\b{re.escape(one)}\b", reason, re.IGNORECASE) for one in words)


def _raised(traceback: str) -> str:
    """The line of a traceback that names its last error; the last line where none does."""
    lines = [line.rstrip() for line in traceback.splitlines() if line.strip()]
    named = [line for line in lines[1:] if RAISED.fullmatch(line)]
    return (named or lines)[-1].strip().rstrip(".")[:SHOWN]

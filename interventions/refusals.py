"""What a server's refusals mean, in a line that says what to do. Knows texts and codes; a leaf."""

from __future__ import annotations

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same question may do."""
UNSURE = (408, 500, 502, 504)
"""Answers after which a job may have been taken all the same: of whatever stands between, or of a fault on the way."""
SHOWN = 300
"""Characters of a server's reason that are shown."""


def is_passing(code: int) -> bool:
    """Whether asking again may do."""
    return code in PASSING


def may_be_taken(code: int) -> bool:
    """Whether the server may have a job that it answered so."""
    return code in UNSURE


def without_key(text: str, key: str | None) -> str:
    """A text without the key, which servers quote."""
    return text.replace(key, "<key>") if key else text


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:SHOWN]


def explain_refusal(host: str, name: str, code: int, detail: str, key: str | None) -> str:
    """What an answer with an error code means."""
    reason = f"{without_key(detail, key).strip().rstrip('.')[:SHOWN]} ({code})"
    low = detail.lower()
    if code in (401, 403) or "api key" in low:
        what = "refuses the key that nnsight found" if key else "wants a key, and nnsight found none"
        return (
            f"{host} {what}: {reason}; get one at https://login.ndif.us, then run `nnsight login` or set NDIF_API_KEY"
        )
    if "version" in low:
        return f"{host} does not take what this machine runs: {reason}; `print(nnsight.compare())` shows where"
    if code == 413:
        return f"{host} takes no job as large as this: {reason}; give a smaller batch_size"
    return f"{host} refuses a job on {name}: {reason}"


def explain_failure(host: str, name: str, description: str) -> str:
    """What the description of a failed job means."""
    lines = [line.strip() for line in description.strip().splitlines() if line.strip()] or ["it gives no reason"]
    reason = (lines[-1] if lines[0].startswith("Traceback") else lines[0]).rstrip(".")[:SHOWN]
    low = description.lower()
    if "architecture" in low or "no module at" in low or "persistent" in lines[-1].lower():
        return f"{name} is built otherwise on {host}: {reason}; other versions; see `print(nnsight.compare())`"
    if any(word in low for word in ("could not deploy", "starting model", "provisioning model", "not found for")):
        return f"{name} cannot be had on {host}: {reason}; `print(nnsight.status())` lists the models that can"
    if "execution timeout" in low:
        return f"{host} stopped a job on {name}: {reason}; give a smaller batch_size"
    if "try again later" in low or "cancelled" in low:
        return f"{host} did not run a job on {name}: {reason}; the same call goes on from what was finished"
    return f"a job on {name} failed on {host}: {reason}"


def is_memory(description: str) -> bool:
    """Whether a job failed for want of memory."""
    low = description.lower()
    return "out of memory" in low or "outofmemory" in low or "can't allocate memory" in low

"""The app: a folder of results in the browser, with every head to click on. Needs the extra ``app`` (Panel).

``serve(folder)`` is all that a caller needs; ``headwise app FOLDER`` calls it. `folder`, `variables`, `head_facts`,
`firing`, `selection` and `text` know nothing of Panel; `session`, `patterns` and `prompts` are the page, and `server`
serves it.
"""

from .server import serve

__all__ = ["serve"]


def __dir__() -> list[str]:
    return __all__

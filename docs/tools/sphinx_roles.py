"""
The roles that docstrings have for Sphinx, such as ``:class:`~sb3_mrq.mrq.MRQ```, as the cross-references of mkdocstrings.
"""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")


def convert(text: str) -> str:
    """
    :param text: of a docstring
    :return: the same with Markdown references in place of roles
    """

    def reference(match: re.Match[str]) -> str:
        short, name = match.groups()
        title = name.rsplit(".", 1)[-1] if short else name
        # A name of the module itself has no full path, and no page to refer to with certainty
        return f"[`{title}`][{name}]" if "." in name else f"`{title}`"

    return ROLE.sub(reference, text)


class SphinxRoles(Extension):
    """Converts each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """
        :param obj: a module, class, function or attribute
        """
        if obj.docstring is not None:
            obj.docstring.value = convert(obj.docstring.value)

# SPDX-License-Identifier: MIT
"""The reST of docstrings for the site: formulas become MathML, roles become code."""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:func|class|meth):`~?([^`]+)`")


def markdown(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        formula = " ".join(textwrap.dedent(match[2]).split())
        return textwrap.indent(f"\n{convert(formula, display='block')}\n\n", match[1])

    text = BLOCK.sub(block, text)
    text = INLINE.sub(lambda match: convert(" ".join(match[1].split())), text)
    return ROLE.sub(r"`\1`", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)

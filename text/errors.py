"""What can go wrong between strings and ids, each with the sentence the user reads. Standard library only.

Broken or hostile files raise `formats.errors.FormatError`; the classes here are about text and templates. Which of
them is the client's fault (`Unencodable`, `TemplateRefused`, `TemplateArgument`, `TemplateBudget`) and which the
operator's (`TemplateError`, `NoChatTemplate`) decides the HTTP status, in `api`.
"""

from __future__ import annotations


class TextError(Exception):
    """Base of everything this room raises on purpose."""


class Unencodable(TextError):
    """The text holds something that the vocabulary has no ordinary token for."""


class TemplateError(TextError):
    """A chat template that does not parse, or that fails on messages of the ordinary form."""


class NoChatTemplate(TemplateError):
    """The checkpoint has no chat template and the configuration names none."""


class TemplateRefused(TextError):
    """The template itself turned the messages down (`raise_exception`), or failed on them."""


class TemplateArgument(TextError):
    """A `chat_template_kwargs` entry that callers may not set."""


class TemplateBudget(TextError):
    """Rendering took more time, memory or output than it may."""

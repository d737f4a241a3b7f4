"""Documents inside an export, decoded to text once: plain text, HTML, RTF and C-CDA or other XML.

What comes out is *the* text of the note: every offset refers to it. Plain text is untouched. HTML and XML keep their
words in order; blocks become lines, table cells are divided by tabs, and runs of blanks shrink to one.
"""

from __future__ import annotations

import binascii
import re
from html.parser import HTMLParser
from typing import Any

from clinical_nlp.notes.readers.files import decode, text_codec

KINDS = ("plain", "text", "html", "rtf", "xml")
"""What can be read, best first."""

_TYPES = {
    "text/plain": "plain",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "text/rtf": "rtf",
    "application/rtf": "rtf",
    "application/x-rtf": "rtf",
    "text/xml": "xml",
    "application/xml": "xml",
}
_NAMED = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}/[a-z0-9][a-z0-9.+-]{0,80}")
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s\";]+)", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "head",
        "header",
        "hr",
        "html",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "title",
        "tr",
        "ul",
        "paragraph",
        "list",
        "item",
        "component",
        "text",
    ]
)
_MAX_UNCLOSED = 1000
_CELLS = frozenset(("td", "th"))


def kind_of(content_type: str | None) -> str | None:
    """Return one of `KINDS` for a content type; "" where none is given (the bytes tell); None where it is not read."""
    media = media_type(content_type)
    if media is None:
        return ""
    if media in _TYPES:
        return _TYPES[media]
    if media.startswith("text/"):
        return "text"
    return "xml" if media.endswith("+xml") and not media.startswith("image/") else None


def media_type(content_type: str | None) -> str | None:
    """Return the media type without parameters, lower-case; None where there is none."""
    return (content_type or "").split(";")[0].strip().lower() or None


def shown_type(content_type: str | None) -> str:
    """Return a content type for a message; what does not look like one is not repeated."""
    media = media_type(content_type)
    return media if media and _NAMED.fullmatch(media) else "a content type that is not well formed"


def from_base64(data: Any) -> tuple[bytes | None, str | None]:
    """Return (bytes, None) of base64 text, white space allowed, or (None, reason)."""
    if not isinstance(data, str):
        return None, "attachment data is not base64 text"
    try:
        return binascii.a2b_base64("".join(data.split()).encode("ascii"), strict_mode=True), None
    except (ValueError, UnicodeError):
        return None, "attachment data is not valid base64"


def document_text(data: bytes, content_type: str | None) -> tuple[str | None, str | None]:
    """Decode a document.

    Parameters
    ----------
    data : its bytes.
    content_type : may carry a charset; without a type the bytes are looked at.

    Returns
    -------
    (text, None), or (None, reason). Never raises.
    """
    kind = kind_of(content_type)
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"{\\rtf"):
        kind = "rtf"
    elif kind == "":
        kind = _sniffed(data, head)
    charset = _CHARSET.search(content_type or "")
    declared = charset[1] if charset else None
    if declared is not None and text_codec(declared) is None:
        return None, "declares a character set that is not known"
    if kind is None:
        return (
            None,
            f"content is {shown_type(content_type)}, which is not read" if content_type else "content is not text",
        )
    if kind == "rtf":
        return _rtf(data, declared)
    if kind == "xml":
        return _xml(data)
    if kind == "html" and declared is None and (meta := _META_CHARSET.search(data[:2048])):
        declared = meta[1].decode("ascii")
    text, problem = decode(data, declared)
    if text is None or kind != "html":
        return text, problem
    return _html(text)


def _sniffed(data: bytes, head: bytes) -> str | None:
    if head.startswith((b"<!doctype html", b"<html")):
        return "html"
    if head.startswith((b"<?xml", b"<clinicaldocument")):
        return "xml"
    return (
        None if head.startswith((b"%pdf", b"pk\x03\x04", b"\x89png", b"\xff\xd8\xff", b"\xd0\xcf\x11\xe0")) else "plain"
    )


def _rtf(data: bytes, declared: str | None) -> tuple[str | None, str | None]:
    from striprtf.striprtf import rtf_to_text

    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{\\rtf"):
        return None, "content is not RTF, although its type says so"
    page = re.search(rb"\\ansicpg(\d{1,5})", data[:4096])
    named = text_codec(f"cp{int(page[1])}") if page else None
    codepage = named or "cp1252"
    raw, problem = decode(data, declared or codepage)
    if raw is None:
        return None, problem
    try:
        return rtf_to_text(raw, encoding=codepage), None
    except Exception:  # the library raises many kinds on damaged input, some of them quoting it
        return None, "content is RTF that cannot be read"


class _Html(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._raw = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("script", "style"):
            self._raw += 1
        elif tag == "br" or tag in _BLOCKS:
            self.parts.append("\n")
        elif tag in _CELLS:
            self.parts.append("\t")
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._raw = max(0, self._raw - 1)
        elif tag in _BLOCKS:
            self.parts.append("\n")
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.parts.append(data if self._pre else re.sub(r"[ \t\r\n\f]+", " ", data))


def _html(text: str) -> tuple[str | None, str | None]:
    # html.parser looks for the end of every unclosed tag anew: minutes for 40,000 of them.
    if text.count("<") - text.count(">") > _MAX_UNCLOSED:
        return None, f"content is HTML with more than {_MAX_UNCLOSED} unclosed tags"
    parser = _Html()
    try:
        parser.feed(text)
        parser.close()
    except Exception:  # html.parser raises AssertionError on some declarations
        return None, "content is HTML that cannot be read"
    return _tidy("".join(parser.parts)), None


def _xml(data: bytes) -> tuple[str | None, str | None]:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        root = fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        return None, "content is XML with a document type or entities, which is refused"
    except (ParseError, ValueError, LookupError, RecursionError):
        return None, "content is XML that is not well formed"
    if _local(root) != "ClinicalDocument":
        return _tidy("".join(_walk(root))), None
    body = next((item for item in root.iter() if _local(item) in ("structuredBody", "nonXMLBody")), None)
    if body is None:
        return None, "content is a C-CDA document without a body"
    if _local(body) == "structuredBody":
        parts: list[str] = []
        for section in (item for item in body.iter() if _local(item) == "section"):
            for child in section:
                if _local(child) in ("title", "text"):
                    parts.extend(("\n", *_walk(child), "\n"))
        return _tidy("".join(parts)), None
    return _unstructured(body)


def _unstructured(body: Any) -> tuple[str | None, str | None]:
    """Return the text of a C-CDA document whose body is another document."""
    text = next((item for item in body if _local(item) == "text"), None)
    if text is None:
        return None, "content is a C-CDA document without a body"
    if text.get("representation") != "B64":
        return _tidy("".join(_walk(text))), None
    if kind_of(text.get("mediaType")) in ("xml", None):
        return None, f"content is a C-CDA document that wraps {shown_type(text.get('mediaType'))}, which is not read"
    data, problem = from_base64(text.text or "")
    return (None, problem) if data is None else document_text(data, text.get("mediaType"))


def _walk(element: Any) -> list[str]:
    """Return the text of an element in document order, without recursion: XML may be nested deeper than the stack."""
    parts: list[str] = []
    stack: list[Any] = [element]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            parts.append(item)
            continue
        name = _local(item).lower()
        edge = "\n" if name in _BLOCKS or name == "br" else "\t" if name in _CELLS else ""
        parts.append(edge)
        parts.append(item.text or "")
        if name in _BLOCKS:
            stack.append(edge)
        for child in reversed(item):
            stack.append(child.tail or "")
            stack.append(child)
    return parts


def _local(element: Any) -> str:
    return element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""


def _tidy(text: str) -> str:
    """Return lines without blanks at their ends, at most one empty line between two, cells divided by one tab."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    kept: list[str] = []
    for line in text.split("\n"):
        cells = [re.sub(r" +", " ", cell).strip() for cell in line.split("\t")]
        line = "\t".join(cell for cell in cells if cell)
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")

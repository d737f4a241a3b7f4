"""ICD-10-CM, from the tabular list that comes with simple-icd-10-cm."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.language.terminology.concepts import Concept, Name, Terminology

_RESIDUAL = re.compile(
    r",? (?:unspecified|not elsewhere classified|NEC|NOS)\b|\[[^\]]*\]|\((?!\w+\))[^)]*\)|^unspecified ", re.I
)


class Icd10cm(Terminology):
    """ICD-10-CM also resolves codes written without the point or in lower case (`e119`)."""

    def resolve(self, concept_id: str) -> str | None:
        """Return the code as the release writes it, whatever the case and with or without its dot, or None."""
        code = concept_id.strip().upper()
        if code not in self.concepts and "." not in code and len(code) > 3:
            code = f"{code[:3]}.{code[3:]}"
        return code if code in self.concepts else None


def bundled_path() -> Path:
    """Return the tabular list inside the simple_icd_10_cm package, without importing it."""
    spec = importlib.util.find_spec("simple_icd_10_cm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted((Path(folder) / "data").glob("icd10c*.xml"))
        if found:
            return found[-1]
    msg = "no ICD-10-CM tabular list: install it with `pip install simple-icd-10-cm`"
    raise MissingDataError(msg)


def read_tabular(path: Path) -> Terminology:
    """Read the tabular XML: chapters, blocks, categories and codes, with the codes that a seventh character makes.

    Seventh-character codes, chapters and blocks are valid ids and are not looked for in notes: nobody writes
    `initial encounter for closed fracture`.
    """
    from defusedxml import ElementTree

    data = path.read_bytes()
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError):
        msg = f"{path} is not the ICD-10-CM tabular XML"
        raise InputError(msg) from None
    concepts: dict[str, Concept] = {}
    unmatched: set[str] = set()

    def add(code: str, names: list[Name], parent: str | None) -> None:
        concepts.setdefault(code, Concept(code, tuple(names), (parent,) if parent else ()))

    for chapter in root.iter("chapter"):
        chapter_id = f"chapter {chapter.findtext('name', '').strip()}"
        add(chapter_id, [Name(chapter.findtext("desc", "").strip(), "label")], None)
        unmatched.add(chapter_id)
        for section in chapter.iter("section"):
            block = section.get("id", "")
            diagnoses = section.findall("diag")
            above = chapter_id
            if block not in [node.findtext("name", "").strip() for node in diagnoses]:  # else it is the code
                label = re.sub(r"\s*\([^)]*\)$", "", section.findtext("desc", "").strip())
                add(block, [Name(label, "label")], chapter_id)
                unmatched.add(block)
                above = block
            for diagnosis in diagnoses:
                for code, names, parent, seventh in _codes(diagnosis, above, {}):
                    add(code, names, parent)
                    for character, meaning in seventh.items():
                        full = f"{code if '.' in code else code + '.'}".ljust(7, "X") + character
                        add(full, [Name(f"{names[0].text}, {meaning}", "label")], code)
                        unmatched.add(full)
    if not concepts:
        msg = f"{path} holds no codes; it is not the ICD-10-CM tabular XML"
        raise InputError(msg)
    release = re.search(r"(January|April|October)-\d+-(\d{4})", path.name)
    version = release[0] if release else (root.findtext("version") or "").strip()
    return Icd10cm("icd10cm", version, hashlib.sha256(data).hexdigest(), concepts, unmatched=frozenset(unmatched))


def _codes(node: Any, parent: str, seventh: dict[str, str]) -> Iterator[tuple[str, list[Name], str, dict[str, str]]]:
    code = node.findtext("name", "").strip()
    own = node.find("sevenChrDef")
    if own is not None:
        seventh = {e.get("char", ""): (e.text or "").strip() for e in own.findall("extension")}
    children = node.findall("diag")
    yield code, _names(node), parent, {} if children else seventh
    for child in children:
        yield from _codes(child, code, seventh)


def _names(node: Any) -> list[Name]:
    label = node.findtext("desc", "").strip()
    names = [Name(label, "label")]
    for group in node.findall("inclusionTerm"):
        names += [Name((note.text or "").strip()) for note in group.findall("note")]
    for name in list(names):
        # `Cholera, unspecified` is what a note means by `cholera`, unless another code has just that name.
        plain = " ".join(_RESIDUAL.sub(" ", name.text).split()).strip(" ,")
        if plain and plain != name.text and len(plain) > 3:
            names.append(Name(plain, "broad" if "specified" in name.text else "exact"))
    return names

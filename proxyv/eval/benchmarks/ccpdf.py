"""CCpdf document parsing: "Recognize text in the image." -> all text of a page, line by line.

Pages of PDF files from the web, from the validation part of DocStruct4M. A page is scored by
BLEU-4 against its text, and by the edit distance over the length of the longer one (lower is
better); both are means over pages.

The data are files, not a hub table: put ``val.jsonl`` and ``val_imgs`` of ``mPLUG/DocStruct4M``
into ``DIR/ccpdf``.

Source: data of DocStruct4M; measures of lmms-eval 0.7.3, ocrbench_v2 page metric. Differs: the
authors' code for this benchmark is not public. Prompts that name a box or quote a text ask for a
part of the page and are left out; markup tags are removed on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import Benchmark, Record, Sample, Score, mean_score
from proxyv.eval.metrics import final_answer, page_bleu, page_edit_distance

__all__ = ["CCpdf"]

PLACEHOLDER = "<|image|>"
_TAGS = re.compile(r"</?(?:doc|md|ocr|bbox)>")
_PARTIAL = re.compile(r"<(?:ocr|bbox)>")


class CCpdf(Benchmark):
    """Whole pages, read to the end."""

    name = "ccpdf"
    repositories = ()
    split = "val"
    columns = ("image", "messages|conversations")
    max_new_tokens = 2048  # a dense page; no setting is published
    main_score = "doc_bleu"

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Only pages of CCpdf that are to be read as a whole."""
        origin = f"{row.get('dataset_name') or ''} {row.get('image') or ''}"
        if "ccpdf" not in origin.lower():
            return []
        try:
            messages = _messages(row)
        except ValueError:
            return [{}]  # `sample` says what is wrong with it
        whole = not messages or not _PARTIAL.search(str(messages[0].get("content")))
        return [{}] if whole else []

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """The page, which the data put into a list."""
        cell = row.get("image")
        return list(cell) if isinstance(cell, list | tuple) else [cell]

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        texts = {message.get("role"): message.get("content") for message in _messages(row)}
        request, page = texts.get("user"), texts.get("assistant")
        if not isinstance(request, str) or not isinstance(page, str):
            raise ValueError("the row has no message of the user, or none of the assistant")
        prompt = request.replace(PLACEHOLDER, "").strip()
        return Sample(
            question_id=self.question_id(index, row),
            question=prompt,
            prompt=prompt,
            references=(_plain(page),),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """BLEU of one page."""
        return page_bleu(_plain(answer), references[0])

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Means over pages; a page that could not be read is at distance 1."""
        distances = [
            page_edit_distance(_plain(final_answer(record["answer"])), record["references"][0])
            if record["error"] is None
            else 1.0
            for record in records
        ]
        return {
            "doc_bleu": mean_score([record["score"] for record in records]),
            "doc_edit_distance": mean_score(distances),
        }


def _messages(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The messages of a row.

    Raises:
        ValueError: their column holds something else.
    """
    column = "messages" if row.get("messages") else "conversations"
    messages = row.get(column) or []
    listed = isinstance(messages, list | tuple)
    if not listed or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"column {column!r} holds {'a list of other things' if listed else 'no list'}, a list "
            "of messages with role and content is needed"
        )
    return messages


def _plain(text: str) -> str:
    return _TAGS.sub("", text).strip()

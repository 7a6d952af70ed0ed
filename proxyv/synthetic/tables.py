"""Rows of the small world in the schemas of benchmarks about documents and charts.

The columns are those of the real data sets, so that the same code reads both.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from proxyv.synthetic.charts import chartqa_type
from proxyv.synthetic.page import Page
from proxyv.synthetic.prompts import PAGE_PROMPT

__all__ = [
    "ENCODED",
    "INTEGER",
    "TEXT",
    "TEXTS",
    "encoded",
    "png_bytes",
    "write_ccpdf",
    "write_chartqa",
    "write_docvqa",
    "write_docvqa_test",
    "write_infovqa",
    "write_parquet",
]

TEXT, TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
INTEGER, ENCODED = datasets.Value("int64"), datasets.Image()

Pages = Iterable[tuple[Page, bytes]]


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encoded(png: bytes) -> dict[str, Any]:
    """A cell of an image column, as ``datasets`` stores it."""
    return {"bytes": png, "path": None}


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], features: dict[str, Any]) -> int:
    """Write one split; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(path))
    return len(rows)


def write_docvqa(folder: Path, pages: Pages, most: int) -> int:
    """DocVQA's validation split, at most so many questions a page."""
    rows = [
        _docvqa_row(f"{document}_{number}", document, page, png, number) | {"data_split": "val"}
        for document, (page, png) in enumerate(pages)
        for number in range(len(page.questions[:most]))
    ]
    return write_parquet(folder / "validation.parquet", rows, _DOCVQA)


def write_docvqa_test(folder: Path, pages: Pages) -> int:
    """DocVQA's test split: one question a page, whose answer is kept back."""
    rows = [
        _docvqa_row(str(document), document, page, png, 0) | {"answers": [], "data_split": "test"}
        for document, (page, png) in enumerate(pages)
    ]
    return write_parquet(folder / "test.parquet", rows, _DOCVQA)


_DOCVQA = {
    "questionId": TEXT,
    "question": TEXT,
    "question_types": TEXTS,
    "image": ENCODED,
    "docId": INTEGER,
    "ucsf_document_id": TEXT,
    "ucsf_document_page_no": TEXT,
    "answers": TEXTS,
    "data_split": TEXT,
}


def _docvqa_row(name: str, document: int, page: Page, png: bytes, number: int) -> dict[str, Any]:
    question = page.questions[number]
    return {
        "questionId": name,
        "question": question.text,
        "question_types": [page.template],
        "image": encoded(png),
        "docId": document,
        "ucsf_document_id": f"small{document:05d}",
        "ucsf_document_page_no": "1",
        "answers": list(question.answers),
    }


def write_chartqa(folder: Path, pages: Pages, most: int) -> int:
    """ChartQA's test split, human questions first as there."""
    rows = [
        {
            "type": chartqa_type(question),
            "question": question.text,
            "answer": question.answers[0],
            "image": encoded(png),
        }
        for page, png in pages
        for question in page.questions[:most]
    ]
    rows.sort(key=lambda row: row["type"] != "human_test")
    features = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": ENCODED}
    return write_parquet(folder / "test.parquet", rows, features)


def write_infovqa(folder: Path, pages: Pages, most: int) -> int:
    """InfographicVQA, at most so many questions a page; two splits.

    The test split has one question a picture, whose answer is kept back.
    """
    rows: list[dict[str, Any]] = [
        {
            "questionId": str(1000 * place + number),
            "question": question.text,
            "answers": list(question.answers),
            "answer_type": ["single span"],
            "image": encoded(png),
            "image_url": f"small://infographic/{place}",
            "operation/reasoning": [question.kind],
            "ocr": json.dumps([page.caption]),
            "data_split": "val",
        }
        for place, (page, png) in enumerate(pages)
        for number, question in enumerate(page.questions[:most])
    ]
    features = {
        **dict.fromkeys(("questionId", "question"), TEXT),
        **dict.fromkeys(("answers", "answer_type"), TEXTS),
        "image": ENCODED,
        "image_url": TEXT,
        "operation/reasoning": TEXTS,
        **dict.fromkeys(("ocr", "data_split"), TEXT),
    }
    first = [row for row in rows if int(row["questionId"]) % 1000 == 0]
    kept_back = [{**row, "answers": [], "data_split": "test"} for row in first]
    count = write_parquet(folder / "test.parquet", kept_back, features)
    return count + write_parquet(folder / "validation.parquet", rows, features)


def write_ccpdf(folder: Path, pages: Pages) -> int:
    """Page parsing in the files of DocStruct4M: a list of messages, and the pages beside it."""
    lines = []
    for page, png in pages:
        name = f"val_imgs/CCpdf/pages/{hashlib.md5(png).hexdigest()}_page0.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png)
        row = {
            "image": [f"./{name}"],
            "messages": [
                {"role": "user", "content": f"<|image|>{PAGE_PROMPT}"},
                {"role": "assistant", "content": f"<doc>{page.caption}</doc>"},
            ],
            "task_name": "qa_sft",
            "dataset_name": "CCpdf",
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "val.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)

"""Rendered documents: forms, invoices, receipts, letters and tables, with questions.

Every kind has layouts for training and others for testing; values come from ``words`` and never
cross the split. ``make_document`` is the entry; ``make_text_page`` draws text without meaning for
the training of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from proxyv.synthetic.page import Page, Question, Split, looks_of
from proxyv.synthetic.sheet import Sheet, TextTooLong, random_style
from proxyv.synthetic.words import Words

__all__ = ["LAYOUTS", "make_document", "make_text_page"]


class Field(NamedTuple):
    """A labelled value of a form: its label, what a question calls it, how to draw a value."""

    label: str
    noun: str
    draw: Callable[[Words], str]


FIELDS: tuple[Field, ...] = (
    Field("Name", "name", Words.person),
    Field("Date", "date", Words.date),
    Field("Phone", "phone number", Words.phone),
    Field("City", "city", Words.city),
    Field("Company", "company", Words.company),
    Field("Address", "address", Words.street),
    Field("Order ID", "order ID", Words.code),
    Field("Amount", "amount", Words.money),
    Field("Job", "job", Words.job),
    Field("Account", "account", Words.code),
    Field("Manager", "manager", Words.person),
    Field("Due", "due date", Words.date),
    Field("Weight", "weight", Words.measure),
    Field("Email", "email", Words.email),
    Field("Ref", "reference", Words.code),
    Field("Time", "time", Words.time),
    Field("Item", "item", Words.product),
    Field("Client", "client", Words.person),
    Field("Fee", "fee", Words.money),
    Field("Serial", "serial number", Words.code),
    Field("Birth", "date of birth", Words.date),
    Field("Supplier", "supplier", Words.company),
    Field("Pages", "number of pages", Words.number),
    Field("Site", "site", Words.city),
)

LAYOUTS: dict[str, dict[Split, tuple[str, ...]]] = {
    "form": {"train": ("inline", "columns", "stacked", "ruled"), "test": ("leaders", "boxed")},
    "invoice": {"train": ("plain", "split"), "test": ("total_first",)},
    "receipt": {"train": ("dashed", "plain"), "test": ("framed",)},
    "letter": {"train": ("block", "spaced"), "test": ("date_last",)},
    "table": {"train": ("ruled", "plain"), "test": ("zebra",)},
}

_ASK = ("What is the {}?", "What {} is given?", "Which {} is shown?")


def make_document(
    rng: np.random.Generator, split: Split, size_hw: tuple[int, int] = (168, 168)
) -> Page:
    """Draw a document of a random kind and layout.

    Args:
        rng: source of everything random; the same state gives the same page.
        split: decides typefaces, layouts and values.
        size_hw: height and width in pixels; more room gets more lines.

    Returns:
        The page, clean (``degrade`` wears it), with at least two questions.
    """
    while True:
        kind = str(rng.choice(list(LAYOUTS), p=[0.4, 0.15, 0.15, 0.12, 0.18]))
        layout = str(rng.choice(LAYOUTS[kind][looks_of(split)]))
        sheet = Sheet(random_style(rng, split), size_hw)
        words = Words(rng, split)
        try:
            questions = _MAKERS[kind](sheet, words, layout)
        except TextTooLong:
            continue
        return Page(
            image=sheet.image,
            glyphs=sheet.glyphs,
            caption="\n".join(sheet.lines),
            questions=questions,
            template=f"{kind}/{layout}",
            split=split,
        )


def make_text_page(
    rng: np.random.Generator, split: Split, size_hw: tuple[int, int] = (168, 168)
) -> Page:
    """Lines of words, names, numbers and meaningless characters, for learning to read."""
    sheet = Sheet(random_style(rng, split), size_hw)
    words = Words(rng, split)
    makers: list[Callable[[], str]] = [
        lambda: words.phrase(int(rng.integers(1, 4))),
        words.random_text, words.person, words.company, words.city, words.street, words.date,
        words.phone, words.code, words.money, words.email, words.product,
        lambda: words.random_text(6),
    ]  # fmt: skip
    y = float(sheet.style.margin_px)
    while y + sheet.style.size_px * 1.1 < sheet.height:
        x = float(sheet.left + rng.integers(0, 12))
        while True:
            text = makers[int(rng.integers(len(makers)))]()
            if rng.random() < 0.08:
                text = text.upper()
            bold = bool(rng.random() < 0.25)
            if x + sheet.length(text, bold=bold) > sheet.right:
                break
            colour = sheet.style.accent if rng.random() < 0.15 else None
            x = sheet.write(text, x, y, bold=bold, colour=colour)
            x += float(rng.integers(4, 14))
        y += sheet.style.leading_px + float(rng.uniform(0, 3))
    return Page(sheet.image, sheet.glyphs, "\n".join(sheet.lines), [], "text/lines", split)


def _ask(words: Words, noun: str, answer: str, kind: str = "lookup") -> Question:
    return Question(words.pick(_ASK).format(noun), (answer,), kind)


def _require(sheet: Sheet, text: str, room: float, bold: bool = False) -> None:
    if not sheet.fits(text, room, bold):
        raise TextTooLong(text)


def _heading(sheet: Sheet, words: Words, title: str, y: float) -> float:
    """A heading, left or centred; returns the y below it."""
    size = sheet.style.size_px + int(words.rng.integers(0, 3))
    if sheet.length(title, bold=True, size_px=size) > sheet.inner:
        raise TextTooLong(title)
    if words.rng.random() < 0.5:
        sheet.write(title, sheet.left, y, bold=True, size_px=size)
    else:
        sheet.write(title, sheet.width / 2, y, bold=True, size_px=size, align="centre")
    below = y + size + 4
    if words.rng.random() < 0.3:
        sheet.rule(below)
        below += 3
    return below


def _rows(sheet: Sheet, y: float, step: float, reserve: float = 0.0) -> int:
    """How many lines of a height still fit below y."""
    return max(0, int((sheet.height - 3 - reserve - y) // step))


def _form(sheet: Sheet, words: Words, layout: str) -> list[Question]:
    rng, style = words.rng, sheet.style
    y = float(style.margin_px)
    if rng.random() < 0.6:
        titles = ("Order form", "Record", "Registration", "Application", "Delivery note", "Permit")
        y = _heading(sheet, words, words.pick(titles), y)
    step = style.leading_px + float(rng.uniform(0, 4))
    step *= 2.0 if layout == "stacked" else 1.0
    step += 5.0 if layout == "boxed" else 0.0
    count = min(_rows(sheet, y, step), int(rng.integers(4, 10)) * max(1, sheet.height // 168))
    chosen = [FIELDS[i] for i in rng.permutation(len(FIELDS))[: min(count, len(FIELDS))]]
    if len(chosen) < 2:
        raise TextTooLong("a form of two fields")
    bold_label = bool(rng.random() < 0.5)
    labels_px = max(sheet.length(field.label + ":", bold_label) for field in chosen)
    questions = []
    for field in chosen:
        value = field.draw(words)
        if layout == "inline":
            x = sheet.write(f"{field.label}:", sheet.left, y, bold=bold_label) + 4
            _require(sheet, value, sheet.right - x)
            sheet.write(value, x, y)
        elif layout == "columns":
            x = sheet.left + labels_px + 8
            _require(sheet, value, sheet.right - x)
            sheet.write(field.label, sheet.left, y, bold=bold_label)
            sheet.write(value, x, y)
        elif layout == "stacked":
            sheet.write(field.label, sheet.left, y, bold=bold_label, colour=style.accent)
            sheet.write(value, sheet.left + 6, y + style.leading_px)
        elif layout == "ruled":
            end = sheet.write(field.label, sheet.left, y, bold=bold_label)
            _require(sheet, value, sheet.right - end - 6)
            sheet.write(value, sheet.right, y, align="right")
            sheet.rule(y + style.size_px + 1)
        elif layout == "leaders":
            end = sheet.write(field.label, sheet.left, y, bold=bold_label) + 3
            room = sheet.right - end - sheet.length(value) - 3
            if room < 6:
                raise TextTooLong(value)
            for dot in np.arange(end, end + room, 4.0):
                sheet.draw.point((dot, y + style.size_px * 0.8), fill=style.ink)
            sheet.write(value, sheet.right, y, align="right")
        else:  # boxed
            x = sheet.left + labels_px + 10
            _require(sheet, value, sheet.right - x - 3)
            sheet.box(x - 4, y - 2, sheet.right, y + style.size_px + 2)
            sheet.write(field.label, sheet.left, y, bold=bold_label)
            sheet.write(value, x, y)
        questions.append(_ask(words, field.noun, value))
        y += step
    return questions


def _items(words: Words, count: int) -> list[tuple[str, str]]:
    """Distinct products with prices."""
    found: dict[str, str] = {}
    while len(found) < count:
        found[words.product(11)] = words.money(100)
    return list(found.items())


def _price_lines(
    sheet: Sheet, items: list[tuple[str, str]], y: float, step: float, inset: float = 0.0
) -> float:
    """Names on the left, prices on the right; returns the y below."""
    for name, price in items:
        end = sheet.write(name, sheet.left + inset, y)
        _require(sheet, price, sheet.right - inset - end - 6)
        sheet.write(price, sheet.right - inset, y, align="right")
        y += step
    return y


def _price_questions(words: Words, items: list[tuple[str, str]]) -> list[Question]:
    asks = ("What is the price of {}?", "How much is {}?", "What does {} cost?")
    return [Question(words.pick(asks).format(name), (price,), "lookup") for name, price in items]


def _total_line(sheet: Sheet, words: Words, y: float, bold: bool = True) -> Question:
    total = words.money(900)
    label = words.pick(("Total", "Amount due", "To pay"))
    end = sheet.write(label, sheet.left, y, bold=bold)
    _require(sheet, total, sheet.right - end - 6, bold)
    sheet.write(total, sheet.right, y, bold=bold, align="right")
    asks = ("What is the total?", "How much is the total?", "What is the amount to pay?")
    return Question(words.pick(asks), (total,), "lookup")


def _invoice(sheet: Sheet, words: Words, layout: str) -> list[Question]:
    style, step = sheet.style, float(sheet.style.leading_px + 1)
    y = float(style.margin_px)
    company, number, date, client = words.company(), words.code(), words.date(), words.person()
    total: Question | None = None
    if layout == "total_first":
        y = _heading(sheet, words, "Invoice", y)
        sheet.box(sheet.left - 2, y - 2, sheet.right + 2, y + style.size_px + 3, fill=style.tint)
        total = _total_line(sheet, words, y)
        y += step + 5
    y = _heading(sheet, words, company, y)
    for label, value in (("Invoice", number), ("Date", date), ("To", client)):
        if layout == "split":
            _require(sheet, f"{label}   {value}", sheet.inner)
            sheet.write(label, sheet.left, y)
            sheet.write(value, sheet.right, y, align="right")
        else:
            text = f"{label}: {value}" if layout == "plain" else f"{label} {value}"
            _require(sheet, text, sheet.inner)
            sheet.write(text, sheet.left, y)
        y += step
    sheet.rule(y + 1)
    y += 4
    count = min(_rows(sheet, y, step, reserve=step + 3), int(words.rng.integers(2, 6)))
    items = _items(words, max(1, count))
    y = _price_lines(sheet, items, y, step)
    if total is None:
        sheet.rule(y + 1)
        total = _total_line(sheet, words, y + 4)
    return [
        Question(words.pick(("Which company sent the invoice?", "Who is the seller?")),
                 (company,), "lookup"),
        Question(words.pick(("What is the invoice number?", "Which invoice number is given?")),
                 (number,), "lookup"),
        Question(words.pick(("What is the date of the invoice?", "What is the invoice date?")),
                 (date,), "lookup"),
        Question(words.pick(("Who is the customer?", "Who is the invoice for?")),
                 (client,), "lookup"),
        total,
        *_price_questions(words, items),
    ]  # fmt: skip


def _receipt(sheet: Sheet, words: Words, layout: str) -> list[Question]:
    style, step = sheet.style, float(sheet.style.leading_px + 1)
    shop, date, time = words.company(), words.date(), words.time()
    inset = 6.0 if layout == "framed" else 0.0
    y = style.margin_px + inset
    _require(sheet, shop, sheet.inner - 2 * inset, bold=True)
    sheet.write(shop, sheet.width / 2, y, bold=True, align="centre")
    y += step
    _require(sheet, f"{date} {time}", sheet.inner - 2 * inset)
    sheet.write(f"{date} {time}", sheet.width / 2, y, align="centre")
    y += step
    if layout == "dashed":
        sheet.rule(y + 1, dashed=True)
    y += 4
    count = min(_rows(sheet, y, step, reserve=step + 5 + inset), int(words.rng.integers(3, 8)))
    items = _items(words, max(1, count))
    y = _price_lines(sheet, items, y, step, inset)
    if layout == "dashed":
        sheet.rule(y + 1, dashed=True)
    total = _total_line(sheet, words, y + 4, bold=layout != "plain")
    if layout == "framed":
        sheet.box(sheet.left - 2, style.margin_px, sheet.right + 2, y + step + 4)
    return [
        Question(words.pick(("What is the name of the shop?", "Which shop is it?")),
                 (shop,), "lookup"),
        Question(words.pick(("What is the date on the receipt?", "What is the date?")),
                 (date,), "lookup"),
        Question(words.pick(("What is the time on the receipt?", "At what time was it paid?")),
                 (time,), "lookup"),
        total,
        *_price_questions(words, items),
    ]  # fmt: skip


def _wrap(sheet: Sheet, text: str, room: float) -> list[str]:
    """Break a text into lines that fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and sheet.fits(longer, room):
            lines[-1] = longer
        else:
            _require(sheet, word, room)
            lines.append(word)
    return lines


def _letter(sheet: Sheet, words: Words, layout: str) -> list[Question]:
    style, step = sheet.style, float(sheet.style.leading_px)
    sender, reader, date = words.person(), words.last_name(), words.date()
    amount, city, meet = words.money(), words.city(), words.time()
    title = words.pick(("Mr.", "Mrs.", "Dr."))
    body = words.pick(
        (
            f"Please send {amount} to our office in {city} before {meet} today.",
            f"We will meet in {city} at {meet}. The price is {amount} in all.",
            f"Your visit to {city} costs {amount}. The bus leaves at {meet}.",
        )
    )
    paragraph = _wrap(sheet, body, sheet.inner)
    closing = words.pick(("Sincerely,", "Regards,", "Yours,"))
    y = float(style.margin_px)
    if layout != "date_last":
        align = "right" if words.rng.random() < 0.5 else "left"
        x = sheet.right if align == "right" else sheet.left
        sheet.write(date, x, y, align=align)  # type: ignore[arg-type]
        y += step + 3
    sheet.write(f"Dear {title} {reader},", sheet.left, y)
    y += step + 2
    gap = 3.0 if layout == "spaced" else 0.0
    needed = (step + gap) * len(paragraph) + 2 * step + 8 + (step if layout == "date_last" else 0)
    if y + needed > sheet.height:
        raise TextTooLong(body)
    for line in paragraph:
        sheet.write(line, sheet.left, y)
        y += step + gap
    sheet.write(closing, sheet.left, y + 3)
    sheet.write(sender, sheet.left, y + 3 + step)
    if layout == "date_last":
        sheet.write(date, sheet.right, y + 5 + 2 * step, align="right")
    return [
        Question(words.pick(("Who signed the letter?", "Who wrote the letter?")),
                 (sender,), "lookup"),
        Question("Who is the letter addressed to?", (f"{title} {reader}", reader), "lookup"),
        Question(words.pick(("What is the date of the letter?", "What is the date?")),
                 (date,), "lookup"),
        Question(words.pick(("What sum is named?", "What amount is given?")), (amount,), "lookup"),
        Question(words.pick(("Which city is named?", "What city is given?")), (city,), "lookup"),
        Question(words.pick(("What time is named?", "What time is given?")), (meet,), "lookup"),
    ]  # fmt: skip


def _table(sheet: Sheet, words: Words, layout: str) -> list[Question]:
    rng, style = words.rng, sheet.style
    step = float(style.leading_px + rng.integers(1, 5))
    y = float(style.margin_px)
    if rng.random() < 0.4:
        titles = ("Stock", "Results", "Members", "Prices", "Staff list", "Summary")
        y = _heading(sheet, words, words.pick(titles), y)
    makers: dict[str, Callable[[], str]] = {
        "Age": lambda: words.number(10, 99),
        "Score": lambda: words.number(10, 999),
        "Price": lambda: words.money(100),
        "Code": words.code,
        "Units": lambda: words.number(10, 9999),
        "City": lambda: words.city(9),
        "Year": lambda: words.number(1950, 2030),
        "Rate": words.percent,
    }
    first = words.pick(("Name", "Item"))
    key = (lambda: words.first_name(9)) if first == "Name" else (lambda: words.product(9))
    columns = [str(c) for c in rng.choice(list(makers), size=2, replace=False)]
    count = min(_rows(sheet, y, step) - 1, int(rng.integers(3, 9)))
    if count < 1:
        raise TextTooLong("a table of one row")
    keys: list[str] = []
    while len(keys) < count:
        name = key()
        if name not in keys:
            keys.append(name)
    cells = [[name, *(makers[column]() for column in columns)] for name in keys]
    edges = [0.0, 0.42, 0.74, 1.0]
    right = bool(rng.random() < 0.4)
    for row, texts in enumerate([[first, *columns], *cells]):
        if layout == "zebra" and row % 2:
            sheet.box(sheet.left - 2, y - 1, sheet.right + 2, y + step - 2, fill=style.tint)
        for column, text in enumerate(texts):
            x0 = sheet.left + edges[column] * sheet.inner
            x1 = sheet.left + edges[column + 1] * sheet.inner
            bold = row == 0
            _require(sheet, text, x1 - x0 - 2, bold)
            at_right = right and column > 0
            sheet.write(text, x1 if at_right else x0, y, bold=bold,
                        align="right" if at_right else "left")  # fmt: skip
        if layout == "ruled" or (layout == "plain" and row == 0):
            sheet.rule(y + style.size_px + 1)
        y += step
    asks = ("What is the {} of {}?", "Which {} does {} have?", "What {} is listed for {}?")
    return [
        Question(words.pick(asks).format(column.lower(), row[0]), (row[index + 1],), "lookup")
        for row in cells
        for index, column in enumerate(columns)
    ]


_MAKERS: dict[str, Callable[[Sheet, Words, str], list[Question]]] = {
    "form": _form,
    "invoice": _invoice,
    "receipt": _receipt,
    "letter": _letter,
    "table": _table,
}

"""The values that fill the small world's pages, and the rule that keeps train and test apart.

Word lists come from Faker's English providers (names, towns, jobs, nouns); numbers, dates, codes
and sums are drawn. A value of three characters or more belongs to exactly one split, decided by a
hash of the value itself, so a test page never shows a name, date or amount that training showed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from faker.providers.address.en_US import Provider as AddressWords
from faker.providers.job import Provider as JobWords
from faker.providers.lorem.en_US import Provider as LoremWords
from faker.providers.person.en_US import Provider as PersonWords

from proxyv.synthetic.page import Split, words_of

__all__ = ["Words", "split_of"]

TEST_SHARE = 5  # one value in five belongs to the test split
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
LONG_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_LEFT_OUT = {"sex", "breast", "devil", "gun", "drug", "suicide", "sexual", "rape", "kill", "hell"}
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def split_of(value: str) -> Split:
    """The split that a value belongs to; case and surrounding space do not count."""
    key = value.strip().lower().encode()
    return "test" if zlib.crc32(key) % TEST_SHARE == 0 else "train"


@cache
def _pool(name: str) -> tuple[str, ...]:
    """One of the word lists, ASCII only and short enough to stand on a small page."""
    lorem = LoremWords.parts_of_speech
    lists: dict[str, tuple[str, ...]] = {
        "first": tuple(PersonWords.first_names),
        "last": tuple(PersonWords.last_names),
        "job": tuple(JobWords.jobs),
        "city_suffix": tuple(AddressWords.city_suffixes),
        "noun": tuple(lorem["noun"]),
        "adjective": tuple(lorem["adjective"]),
        "verb": tuple(lorem["verb"]),
    }
    return tuple(
        sorted(
            {
                word
                for word in lists[name]
                if word.isascii() and 0 < len(word) <= 14 and word.lower() not in _LEFT_OUT
            }
        )
    )


class Words:
    """Draws values of one split from a generator.

    Args:
        rng: source of randomness; the same state gives the same values.
        split: the split whose values are drawn.
    """

    def __init__(self, rng: np.random.Generator, split: Split) -> None:
        self.rng = rng
        self.split = words_of(split)

    def pick(self, options: tuple[str, ...] | list[str]) -> str:
        """One of the options, whatever its split (for labels, months and the like)."""
        return options[int(self.rng.integers(len(options)))]

    def _draw(self, make: Callable[[], str], max_len: int) -> str:
        """Draw until the value fits and belongs to this split."""
        for _ in range(1000):
            value = make()
            if len(value) <= max_len and (len(value) < 3 or split_of(value) == self.split):
                return value
        raise ValueError(f"max_len {max_len}: no value of split {self.split!r} is that short")

    def _integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def first_name(self, max_len: int = 9) -> str:
        """A first name: "Maria"."""
        return self._draw(lambda: self.pick(_pool("first")), max_len)

    def last_name(self, max_len: int = 10) -> str:
        """A family name: "Jensen"."""
        return self._draw(lambda: self.pick(_pool("last")), max_len)

    def person(self, max_len: int = 15) -> str:
        """A full name: "Maria Jensen" or "M. Jensen"."""

        def make() -> str:
            first, last = self.pick(_pool("first")), self.pick(_pool("last"))
            return f"{first[0]}. {last}" if self.rng.random() < 0.25 else f"{first} {last}"

        return self._draw(make, max_len)

    def company(self, max_len: int = 16) -> str:
        """A company: "Walter Group"."""
        suffixes = ("Inc", "LLC", "Group", "PLC", "Ltd", "& Co", "Labs", "Foods", "Motors", "Bank")
        return self._draw(lambda: f"{self.pick(_pool('last'))} {self.pick(suffixes)}", max_len)

    def city(self, max_len: int = 13) -> str:
        """A made-up town: "Lake Diane", "Johnbury"."""

        def make() -> str:
            if self.rng.random() < 0.3:
                prefixes = ("North", "East", "West", "South", "New", "Lake", "Port")
                return f"{self.pick(prefixes)} {self.pick(_pool('first'))}"
            return f"{self.pick(_pool('first'))}{self.pick(_pool('city_suffix'))}"

        return self._draw(make, max_len)

    def street(self, max_len: int = 16) -> str:
        """A street with its number: "204 Reyes Road"."""
        ends = ("Road", "Lane", "Ave", "Way", "Hill", "Park", "Court", "Row", "Mews", "St")
        return self._draw(
            lambda: f"{self._integer(1, 400)} {self.pick(_pool('last'))} {self.pick(ends)}", max_len
        )

    def job(self, max_len: int = 14) -> str:
        """A job: "Archivist"."""
        return self._draw(lambda: self.pick(_pool("job")), max_len)

    def noun(self, max_len: int = 9) -> str:
        """A common noun, capitalised: "Window"."""
        return self._draw(lambda: self.pick(_pool("noun")).capitalize(), max_len)

    def product(self, max_len: int = 12) -> str:
        """Something for sale: "Blue window", "Paper"."""

        def make() -> str:
            if self.rng.random() < 0.5:
                return self.pick(_pool("noun")).capitalize()
            return f"{self.pick(_pool('adjective')).capitalize()} {self.pick(_pool('noun'))}"

        return self._draw(make, max_len)

    def phrase(self, count: int) -> str:
        """A few lower-case words, for running text."""
        kinds = ("adjective", "noun", "verb")
        return " ".join(self.pick(_pool(self.pick(kinds))) for _ in range(count))

    def date(self) -> str:
        """A date in one of several notations."""

        def make() -> str:
            day, month, year = self._integer(1, 29), self._integer(1, 13), self._integer(1980, 2030)
            style = self._integer(0, 6)
            return (
                f"{day:02d}/{month:02d}/{year}",
                f"{year}-{month:02d}-{day:02d}",
                f"{day} {MONTHS[month - 1]} {year}",
                f"{MONTHS[month - 1]} {day}, {year}",
                f"{day:02d}.{month:02d}.{year}",
                f"{month}/{day}/{year % 100:02d}",
            )[style]

        return self._draw(make, 12)

    def time(self) -> str:
        """A time of day: "14:35"."""
        return self._draw(lambda: f"{self._integer(0, 24):02d}:{self._integer(0, 60):02d}", 5)

    def phone(self) -> str:
        """A telephone number: "555-0142"."""

        def make() -> str:
            head, tail = self._integer(200, 1000), self._integer(0, 10000)
            area = f"({self._integer(200, 1000)}) " if self.rng.random() < 0.2 else ""
            return f"{area}{head}-{tail:04d}"

        return self._draw(make, 14)

    def code(self) -> str:
        """A reference such as "KX-2041", "90817" or "B7305"."""

        def make() -> str:
            letters = "".join(self.pick(list(_LETTERS)) for _ in range(self._integer(1, 4)))
            digits = str(self._integer(100, 100000))
            style = self._integer(0, 4)
            return (f"{letters}-{digits}", digits + "0", f"{letters}{digits}", f"#{digits}")[style]

        return self._draw(make, 9)

    def money(self, high: int = 1000) -> str:
        """A sum: "$48.20", "312.00"."""

        def make() -> str:
            whole, cents = self._integer(1, high), self._integer(0, 100)
            mark = "$" if self.rng.random() < 0.6 else ""
            return f"{mark}{whole}.{cents:02d}"

        return self._draw(make, 9)

    def number(self, low: int = 10, high: int = 1000) -> str:
        """A whole number."""
        return self._draw(lambda: str(self._integer(low, high)), 9)

    def sum(self) -> str:
        """An addition with its result: "12 + 30 = 42"."""

        def make() -> str:
            first, second = self._integer(2, 50), self._integer(2, 50)
            return f"{first} + {second} = {first + second}"

        return self._draw(make, 12)

    def percent(self) -> str:
        """A share: "42%"."""
        return self._draw(lambda: f"{self._integer(10, 100)}%", 4)

    def measure(self) -> str:
        """A number with its unit: "42 kg", "17.5 %"."""
        units = ("kg", "km", "cm", "%", "h", "ml", "lb", "mi")

        def make() -> str:
            tail = f".{self._integer(0, 10)}" if self.rng.random() < 0.4 else ""
            return f"{self._integer(2, 500)}{tail} {self.pick(units)}"

        return self._draw(make, 9)

    def email(self) -> str:
        """An address: "jensen@lake.org"."""
        ends = (".com", ".org", ".net")

        def make() -> str:
            who, where = self.pick(_pool("last")), self.pick(_pool("noun"))
            return f"{who}@{where}{self.pick(ends)}".lower()

        return self._draw(make, 17)

    def random_text(self, max_len: int = 14) -> str:
        """Characters without meaning, so that a reader cannot lean on language."""
        alphabet = "".join(chr(code) for code in range(33, 127))
        length = self._integer(3, max_len + 1)
        return self._draw(
            lambda: "".join(alphabet[self._integer(0, len(alphabet))] for _ in range(length)),
            max_len,
        )

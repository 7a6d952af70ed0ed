"""What the small world's rows ask, in the words of the benchmarks.

Training asks as evaluation does. The benchmarks themselves belong to ``proxyv.eval``, which data
does not import; the tests compare the two.
"""

__all__ = [
    "BOX_PROMPT",
    "CHART_PROMPT",
    "DOCUMENT_PROMPT",
    "FORMULA_QUESTION",
    "PAGE_PROMPT",
    "READ_PROMPT",
    "SIGN_QUESTION",
    "WORD_QUESTION",
]

DOCUMENT_PROMPT = "\nAnswer the question using a single word or phrase."
"""Behind a question of DocVQA, InfographicVQA or TextVQA."""

CHART_PROMPT = "\nAnswer the question with a single word."
"""Behind a question of ChartQA."""

READ_PROMPT = "Read the page."
"""Of captions, in stage 1."""

PAGE_PROMPT = "Recognize text in the image."
"""Of pages to be parsed, as in DocStruct4M."""

BOX_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right "
    "x, bottom-right y). All values are floating point numbers bounded between 0 and 1. Please "
    "provide the bounding box coordinate of the region this sentence describes: "
)
"""Before a sentence of RefCOCO."""

SIGN_QUESTION = "What is written on the sign?"
"""Of scenes: TextVQA puts an instruction behind it, OCRBench none."""

WORD_QUESTION = "what is written in the image?"
"""Of OCRBench's categories of single words."""

FORMULA_QUESTION = "Please write out the expression in the image using LaTeX format."
"""Of OCRBench's formulas."""

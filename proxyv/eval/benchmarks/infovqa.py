"""InfoVQA: "Which social platform has heavy female audience?" -> "pinterest".

Questions about infographics that mix text, drawings and charts; some need counting or sums.
Scored by ANLS; 2,801 validation questions. The answers of the 3,288 test questions are known to
the test server only: that task writes the file to submit.

Source: lmms-eval 0.7.3, tasks infovqa_val and infovqa_test. Differs: no.
"""

from __future__ import annotations

from proxyv.eval.benchmarks.docvqa import DocVQA, DocVQATest

__all__ = ["InfoVQA", "InfoVQATest"]


class InfoVQA(DocVQA):
    """Questions about infographics: asked and scored as DocVQA is."""

    name = "infovqa"
    config = "InfographicVQA"
    document_column = "image_url"


class InfoVQATest(DocVQATest):
    """The test questions, whose answers only the test server knows."""

    name = "infovqa_test"
    folder = "infovqa"
    config = "InfographicVQA"
    document_column = "image_url"

"""The paper's tables at small scale: every arm trained and evaluated, and a report with verdicts.

``plan.py`` reads a preset's table of arms, ``work.py`` trains and evaluates one, ``results.py`` is
the file that each leaves, ``claims.py`` what the paper says and the rule of its verdict, and
``report.py`` writes the report from the result files alone.
"""

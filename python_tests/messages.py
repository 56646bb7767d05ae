"""The grammar of an error message, checked."""

import re

import pytest


def check(case):
    """Run a case (call, error, words): it raises the error with the words, in one sentence with a fix."""
    run, error, words = case
    with pytest.raises(error, match=words) as caught:
        run()
    text = str(caught.value)
    # what, what was got, and what to do about it: three clauses, one line
    assert re.fullmatch(r"[\w-]+: [^\n]+[.;] [A-Z][^\n]+\.", text), text
    assert "must" in text or "cannot" in text

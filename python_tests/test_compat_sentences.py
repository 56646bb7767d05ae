"""What the faces say of themselves: differences and refusals in one form, which pages and reports print as it is."""

import re

import pytest

from vqkernels.compat import registry
from vqkernels.compat.face import Face, UnservedOption, unserved

KNOWN = {registry.face_of(name) for name in registry._FACES}
# other tests register faces of their own
FACES = sorted(
    (face for face in KNOWN if face.__module__.startswith("vqkernels.")), key=lambda face: face.__name__
)
# what the peer does -> what ours does
FORM = re.compile(r"The peer('s)? [^;]+; ours,? [^;]+\.")


def is_well_formed(sentence: str) -> bool:
    """One line of a report of 100 columns: the peer, then ours."""
    return FORM.fullmatch(sentence) is not None and len(sentence) <= 98 and "  " not in sentence


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_differences_have_one_form(face: type[Face]):
    assert face.differences and [each for each in face.differences if not is_well_formed(each)] == []
    assert len(set(face.differences)) == len(face.differences)


@pytest.mark.parametrize(
    "sentence",
    [
        "the peer rounds; ours does not.",
        "The peer rounds; ours does not",
        "Ours does not round.",
        "The peer rounds.",
        f"The peer {'r' * 100}; ours does not.",
        "The peer rounds; ours does not; so there.",
    ],
)
def test_the_form_excludes_others(sentence: str):
    assert not is_well_formed(sentence)


def test_refusals_name_face_option_and_way_out():
    with pytest.raises(
        UnservedOption, match=r"^Face: topk must be left at what vqkernels serves; got 2\. Set it to 1\.$"
    ):
        unserved("Face", "topk", 2, "Set it to 1")

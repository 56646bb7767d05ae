"""`python -m vqkernels info`: works whatever is missing, and says what."""

from importlib.machinery import EXTENSION_SUFFIXES

from vqkernels import native
from vqkernels.__main__ import main


def test_info_names_every_op_and_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "vqkernels",
        "torch",
        "threads",
        "nearest_code",
        "directional_backward",
        "reference",
        "ready",
    ):
        assert word in printed


def test_info_works_and_the_rest_says_what_to_install(monkeypatch, capsys):
    import vqkernels.cli.info as module

    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "tyro" else find(name)
    )
    assert main(["info"]) == 0
    assert "tyro not installed" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert 'tyro not installed; run pip install "vqkernels[train]"' in capsys.readouterr().err


def test_sources_that_hide_an_installed_extension_are_named(tmp_path, monkeypatch):
    """In a clone after `pip install .`, which a quiet fall back to the reference would make slow."""
    sources, installed = tmp_path / "clone/vqkernels", tmp_path / "site/vqkernels"
    for folder in (sources, installed):
        folder.mkdir(parents=True)
    monkeypatch.setattr(native, "__file__", str(sources / "native.py"))
    monkeypatch.setattr(native.sys, "path", [str(sources.parent), str(installed.parent)])
    assert native._why_not_built().endswith("(pip install --no-build-isolation --editable .)")
    (installed / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    assert f"and hides {installed}, where it is (run from another folder" in native._why_not_built()
    (sources / "native_missing.txt").write_text("no C++ compiler was found\n")
    assert native._why_not_built() == "the extension was not built: no C++ compiler was found"

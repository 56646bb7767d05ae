"""`python -m vqkernels info`: works whatever is missing, and says what."""

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

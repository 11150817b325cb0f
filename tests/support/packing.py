"""Packing from the command line, as tests do it."""

from loaders import pack
from loaders.packs.shard import Pack


def run(*words):
    return pack.main([str(word) for word in words])


def packed(source, tmp_path, *options):
    """Key → (bytes, name of the class), and the pack."""
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--force", *options) == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert opened.verify() == []
    found = {
        opened.keys[i]: (opened.record(i).tobytes(), opened.class_names[opened.labels[i]]) for i in range(len(opened))
    }
    return found, opened


def refused(capsys, source, tmp_path, *options):
    assert run(source, tmp_path / "no.h5", "--workers", "0", *options) == 2
    assert not list(tmp_path.glob("*no*.h5*"))
    return capsys.readouterr().err

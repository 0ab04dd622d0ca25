"""How the native library comes to be: compiled once, never trusted from others, absent with a reason."""

import pytest

from kernels.cpu import library
from tests.kernels.native_cases import built, needs_library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing cached, on disk or in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cache in (library._library_path, library._compiler, library._open):
        cache.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cache in (library._library_path, library._compiler, library._open):
        cache.cache_clear()


@needs_library
def test_it_is_compiled_once(fresh, monkeypatch):
    """After one build the cached file is found, and no compiler is run again."""
    monkeypatch.setattr(library, "_OPTIONS", ("-O0", *library._OPTIONS[1:]))  # quick: it is not run
    assert library.cached() is None
    first = library.build()
    assert len(list((fresh / "searoom" / "native").iterdir())) == 1, "temporary files stay behind"
    monkeypatch.setattr(library.subprocess, "run", None)
    assert library.cached() is first and library.build() is first


@needs_library
def test_a_file_that_others_can_write_is_not_run(fresh):
    """A library that anybody could have exchanged counts as not there."""
    path = library._library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"anything")
    path.chmod(0o666)
    assert library.cached() is None


@needs_library
def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    """The error carries the compiler's own words, and leaves nothing behind."""
    monkeypatch.setattr(library, "_OPTIONS", ("--no-such-option",))
    with pytest.raises(RuntimeError, match="no-such-option"):
        library.build()
    assert list((fresh / "searoom" / "native").iterdir()) == []


def test_a_machine_without_a_compiler_says_so(fresh, monkeypatch):
    """The reason names what is looked for."""
    monkeypatch.setattr(library, "_cpu_flags", lambda: frozenset(library._NEEDED_FLAGS))
    monkeypatch.setattr(library, "_compiler", lambda: None)
    assert "g++" in library.unsupported()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        library.build()


def test_a_cpu_without_the_instructions_says_so(fresh, monkeypatch):
    """The reason names the missing instruction sets."""
    monkeypatch.setattr(library, "_cpu_flags", lambda: frozenset(library._NEEDED_FLAGS - {"avx512_vnni"}))
    assert library.unsupported() == "this CPU lacks avx512_vnni"
    assert library.cached() is None


@needs_library
def test_the_build_for_the_tests_is_there():
    """What the other tests use is what `cached` finds."""
    assert built() is library.cached()

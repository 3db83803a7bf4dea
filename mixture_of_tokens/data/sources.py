"""Where text comes from: files, folders, globs, data sets of the Hub, and the Python source text of this machine.

Text is read byte for byte, so that bits per byte count a file's own bytes, line ends included.
"""

import fnmatch
import glob
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixture_of_tokens.data.files import LINES, Document, documents_in, has_json_rows, suffix, text_of_row
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.formatting import few_of, first_line
from mixture_of_tokens.utils.manifest import hash_of_file
from mixture_of_tokens.utils.progress import say_once, warn

PACKAGES = "packages"  # the source that is all Python packages installed for this interpreter

# Suffixes that a folder is searched for; a file that is named directly may have any suffix.
PROSE = ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .csv .tsv .log"
CODE = (
    ".py .pyi .js .mjs .ts .jsx .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu .cuh .cs .go .rs .rb .php "
    ".pl .lua .r .jl .swift .m .hs .ml .ex .exs .erl .clj .lisp .el .sh .bash .sql .css .scss .yaml .yml .toml .ini"
)
TABLES = (*LINES, ".parquet")
OTHER_TABLES = (".csv", ".tsv", ".json")
KNOWN = {*PROSE.split(), *CODE.split(), *TABLES}
# What this library writes may lie in a folder of text, and grows while that is read: runs, and beside them comparisons.
IN_A_RUN = {"config.yaml", "metrics.jsonl"}
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux
MANY = 0.2  # of a folder's files are left out: worth a word
OF_SEVERAL, PAGE = {"compare.json", "sweep.json"}, "report.html"


def documents(
    sources: Sequence[str], field: str = "text", *, together: bool = False, commits: Mapping[str, str] | None = None
) -> Iterator[Document]:
    """The documents of all sources in order: files, rows of JSON lines and .parquet files, rows of Hub data sets.

    A .json file holds JSON lines if its first line is an object with the field; otherwise it is one document. Read all
    parts of a document before taking the next document.

    Args:
        sources: Each a file, a folder (searched for known suffixes, hidden files left out), a glob,
            hf:NAME[:CONFIG][@REVISION], or packages; empty for the standard library. All files but .parquet may be .gz
            or .zst.
        field: The field of a row that holds its text.
        together: The sources are parts of one, of which some may be empty.
        commits: Of Hub data sets, by source, as `fingerprint` has found them; by default the newest.

    Raises ValueError, with file and line, if a source is missing, empty or not UTF-8 text.
    """
    if not sources:
        yield from _decodable(_library_files())
    for source in sources:
        holds_text = False

        def noted(parts: Iterable[bytes]) -> Iterator[bytes]:
            nonlocal holds_text
            for part in parts:
                holds_text = holds_text or bool(part.strip())
                yield part

        if source == PACKAGES:
            rows = _decodable(_package_files())
        else:
            hub = source.startswith("hf:")
            rows = _hub_rows(source, field, (commits or {}).get(source)) if hub else _of_files(files(source), field)
        for document in rows:
            yield noted(document)
        if not holds_text and not together:
            raise ValueError(f"{source} is empty: there is no text in it")


def files(source: str) -> list[Path]:
    """The files that a file, folder or glob stands for, in a fixed order.

    Raises ValueError if there are none.
    """
    path = located(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        there = list(_walk(path, runs=False))
        found = [_regular(file) for file in there if suffix(file) in KNOWN]
        if not found:
            raise ValueError(f"{source} holds no file of a known kind, such as .txt, .md, .py, .jsonl or .parquet")
        others = [file for file in there if suffix(file) not in KNOWN]
        if len(others) > MANY * len(there):
            say_once(f"{source}: files of other kinds are left out, {few_of(others)}; those that are named are read")
        return found
    if glob.has_magic(source):
        matches = _below(path) if "**" in path.parts else sorted(glob.glob(str(path)))
        folders = dict.fromkeys(filter(os.path.isdir, matches))  # in order, and found at once among many
        found = [_regular(Path(match)) for match in matches if match not in folders]
        if not found:
            raise ValueError(f"{source} matches no file")
        if folders:
            say_once(
                f"{source} is read without the folders that it matches, {few_of(folders)}; name them too, or use **"
            )
        return found
    if not path.exists():
        text = "; it looks like text: write that to a file, and name the file" if "\n" in source else ""
        raise ValueError(f"{source}: there is no such file or folder{text}")
    return [_regular(path)]


def _below(pattern: Path) -> list[str]:
    """The files that a pattern with ** matches, of those that are read where their folder is named.

    glob would follow links to folders, of which two in a circle take for ever.
    """
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    folder, wanted = Path(*pattern.parts[:first]), pattern.parts[first:]
    found = _walk(folder, runs=False) if folder.is_dir() else ()
    return sorted(str(file) for file in found if _matches(file.relative_to(folder).parts, wanted))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Both in parts, of which ** stands for any number."""
    if not pattern:
        return not path
    first, *rest = pattern
    if first == "**":
        return any(_matches(path[start:], rest) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], first) and _matches(path[1:], rest)


def located(source: str) -> Path:
    """The path that a user has named. Raises ValueError if the name is empty, or names a home that nobody has."""
    if not source:  # as a path it would be the current folder
        raise ValueError("an empty name ('') was given where a file or folder should be named")
    if max(map(len, os.fsencode(source).split(b"/"))) > LONGEST_NAME or len(os.fsencode(source)) > LONGEST_PATH:
        raise ValueError(f"{source[:40]!r}... is too long for the name of a file: write text to a file, and name that")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{source}: there is no such home directory") from error


def _regular(path: Path) -> Path:
    """The path itself. Raises ValueError unless it is a regular file, or a link to one: a named pipe would wait."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; remove it") from None
        raise
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        kind = kinds.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path} is no regular file but {kind}; text is read more than once, so it must be in a file")
    return path


def _paths(source: str | None) -> list[Path] | None:
    """The files of a source (None is the standard library), or None for a data set that is not local."""
    if source is None:
        return _library_files()
    if source == PACKAGES:
        return _package_files()
    if source.startswith("hf:"):
        folder = Path(_hub_name(source)[0])
        return [_regular(file) for file in _walk(folder)] if folder.is_dir() else None
    return files(source)


def fingerprint(source: str | None, progress: Callable[[int], Any]) -> list[str]:
    """What a source's text depends on: the content and kind of its files, or the commit of a Hub data set.

    Args:
        source: None is the standard library.
        progress: Called with the number of bytes read.
    """
    if source == PACKAGES and os.path.isdir(PACKAGES):
        warn(f"{PACKAGES} are those that are installed; the folder here is ./{PACKAGES}")
    paths = _paths(source)
    if paths is None:
        assert source is not None
        name, config, revision = _hub_name(source)
        return [name, config, _hub_commit(name, revision)]
    result, kinds = [], ["".join(path.suffixes[-2:]) for path in paths]
    if source is not None and source.startswith("hf:"):
        # A data set's files are read differently from a folder's: its configuration selects them, and they are of
        # splits by their names.
        folder, config, _ = _hub_name(source)
        result, kinds = ["hf", config], [os.path.relpath(path, folder) for path in paths]
    return result + [f"{kind} {hash_of_file(path, progress)}" for kind, path in zip(kinds, paths, strict=True)]


def state_of(source: str | None) -> dict[Path, tuple[int, ...]] | None:
    """What changes when a file of a source is written to, its size second; None for a data set that is not local."""
    paths = _paths(source)
    if paths is None:
        return None
    status = {path: path.stat() for path in paths}
    return {path: (at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for path, at in status.items()}


def _of_files(paths: list[Path], field: str) -> Iterator[Document]:
    as_text = [path for path in paths if suffix(path) in OTHER_TABLES and not has_json_rows(path, field)]
    if as_text:
        what = "is read as one text" if len(as_text) == 1 else "are read as one text each"
        say_once(f"{few_of(as_text)} {what}: rows are documents in .jsonl and .parquet")
    for path in paths:
        yield from documents_in(path, field)


def _walk(folder: Path, without: Sequence[str] = (), *, runs: bool = True) -> Iterator[Path]:
    """The files below a folder, in a fixed order, but for hidden ones and for those in folders of these names.

    Args:
        runs: with those of runs, comparisons and sweeps.
    """

    def stop(error: OSError) -> None:  # os.walk alone skips a folder that it cannot read
        raise error

    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        own: set[str] = set()
        if not runs and set(names) >= IN_A_RUN:
            folders[:], own = [], set(names)
        elif not runs and not OF_SEVERAL.isdisjoint(names):
            own = {*OF_SEVERAL, PAGE}
        yield from (Path(root, name) for name in sorted(names) if not name.startswith(".") and name not in own)


def _library_files() -> list[Path]:
    """The modules of this Python's standard library, as far as it is installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _walk(root, without=("site-packages", "dist-packages"))
    return [p for p in found if p.suffix == ".py" and p.is_file()]  # Debian links one to what need not be there


def _package_files() -> list[Path]:
    """The modules of all packages that are installed for this Python. Raises ValueError if there are none."""
    roots = sorted({Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")})
    found = [p for root in roots if root.is_dir() for p in _walk(root) if p.suffix == ".py" and p.is_file()]
    if not found:
        raise ValueError(f"{PACKAGES}: no packages are installed in {' or '.join(map(str, roots))}")
    return found


def _decodable(paths: list[Path]) -> Iterator[Document]:
    """Files of source text but for those in other encodings, such as test data."""
    for path in paths:
        text = path.read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        yield [text]


def cache_directory() -> Path:
    return located(os.environ.get("MIXTURE_OF_TOKENS_CACHE") or "~/.cache/mixture_of_tokens")


def _hub_name(source: str) -> tuple[str, str, str]:
    """Name, configuration and revision of a data set, empty where they are not given. The name may be a folder's."""
    given, revision = source.removeprefix("hf:"), ""
    name, _, config = given.partition(":")
    if not Path(name).is_dir():  # whose name may have an @
        given, _, revision = given.partition("@")
        name, _, config = given.partition(":")
    if revision and Path(name).is_dir():
        raise ValueError(f"{source}: {name} is a folder here, and has no revisions")
    if not name:
        raise ValueError(f"{source} names no data set; hf:NAME, hf:NAME:CONFIG or hf:NAME@REVISION would")
    return name, config, revision


def _hub_note(name: str, revision: str) -> Path:
    """The file of the last known commit of a Hub data set, by which prepared data is found without a network."""
    return cache_directory() / "hub" / (f"{name}@{revision}" if revision else name).replace("/", "--")


def _hub_commit(name: str, revision: str) -> str:
    """The newest commit of a data set, or of its revision; without a network the last known one, or the revision.

    Raises ValueError where the Hub does not give it: it is private, gated or not there.
    """
    from huggingface_hub import dataset_info

    note = _hub_note(name, revision)
    try:
        commit = dataset_info(name, revision=revision or None, timeout=10).sha or ""
    except Exception as error:  # of many kinds where there is no network
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise ValueError(f"hf:{name}: the Hub does not give it (status {status}): {first_line(error)}") from error
        return note.read_text() if note.exists() else revision
    note.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, commit)
    return commit


def _hub_rows(source: str, field: str, commit: str | None) -> Iterator[Document]:
    import datasets  # here, as importing it takes time and few runs need it

    name, config, revision = _hub_name(source)
    if commit is None and not Path(name).is_dir():
        commit = _hub_commit(name, revision)
    number = 0
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True, revision=commit or None)
        for number, row in enumerate(rows, 1):
            yield text_of_row(f"row {number}", row, field)
    except Exception as error:  # errors of the network or of the file's format, of many kinds
        raise ValueError(f"{source} cannot be read beyond row {number}: {first_line(error)}") from error

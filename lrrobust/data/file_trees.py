"""Read-only access to the files of a folder, a zip or a tar, all through one interface.

Archives come from anywhere, so nothing is ever extracted to disk: names are only compared, links are followed
within the archive alone, special files are passed over, and the size of what is read is bounded.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import logging
import lzma
import math
import os
import posixpath
import stat
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from lrrobust.data.image_source import CorruptImageError
from lrrobust.errors import DataError

_log = logging.getLogger(__name__)

#: Where a file of an archive lies, in its own way.
Place = TypeVar("Place")

#: Ten times the largest image of ImageNet; stops a small archive from unpacking into all memory.
MAX_MEMBER_BYTES = 200_000_000

#: Encoded images of compressed tars are kept in memory up to here, and in a temporary file beyond.
SPOOL_MEMORY_BYTES = 1_000_000_000

#: <root>/<split>/<class>/images/<file> is the deepest layout there is, with one folder to spare. The
#: bound ends the walk where a link leads back to a folder above it.
_MAX_FOLDER_DEPTH = 5

#: That one after the other may lead to a file: some lead in a circle.
_MOST_LINKS = 10

#: Of a link in a zip, whose content is the path it points to.
_LONGEST_PATH = 4096

#: As the header of a zip says it; PowerShell separates folders with backslashes there.
_WRITTEN_ON_WINDOWS = 0

#: The record at its end, with the longest comment.
_LONGEST_ZIP_END = 22 + (1 << 16)

#: Compressed files unpack to no more than this and so many times their size: images hardly compress.
MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO = 1_000_000_000, 100

#: A header that holds a long name, or other things about a file, is read into memory.
_MAX_HEADER_BYTES = 1_000_000
_READ_AS_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip

_DECOMPRESSORS: dict[str, Callable[[Path], BinaryIO]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.bz2": bz2.open,
}
ARCHIVE_SUFFIXES = (".zip", ".tar", *_DECOMPRESSORS)

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError)

#: Besides what tarfile foresees: headers of sparse files that are no numbers, or end too soon.
_TAR_DAMAGE = (*_DAMAGE, ValueError, IndexError)


class _BoundedTarInfo(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            # Behind the first file tarfile would take it for the end, and the rest would be missing.
            raise tarfile.ReadError(str(error)) from error
        if info.type in _READ_AS_HEADERS and info.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {info.size} bytes, at most {_MAX_HEADER_BYTES} are read")
        if info.type == tarfile.GNUTYPE_SPARSE and buf[482]:
            raise tarfile.ReadError("a sparse file whose map goes on without a bound")
        return info


class Span(NamedTuple):
    """Where the bytes of a file lie in a larger one."""

    offset: int
    size_bytes: int


def most_unpacked_bytes(path: Path) -> int:
    """What a compressed file of images may unpack to."""
    return MAX_UNPACKED_BYTES + _MAX_UNPACKED_RATIO * path.stat().st_size


class Spool:
    """Bytes put away while a compressed archive streams by, since it cannot be read out of order.

    Small ones stay in memory. A compressed copy of ImageNet would fill it, so past
    `memory_bytes` everything moves to an unnamed temporary file, gone when the program ends.
    """

    def __init__(self, memory_bytes: int = SPOOL_MEMORY_BYTES) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=memory_bytes)
        self._end = 0
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def append(self, data: bytes) -> Span:
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            span = Span(self._end, len(data))
            self._end += len(data)
        return span

    def read(self, span: Span) -> bytes:
        with self._lock:
            self._file.seek(span.offset)
            return self._file.read(span.size_bytes)


class FileTree(ABC):
    """The files of a folder or an archive that end in one of `suffixes`; "/train" is a whole name.

    Attributes:
        path: of the folder or archive.
        ignored_count: files passed over: other suffixes, links, hidden and unsafe names.
        unread: how many files of other suffixes there are, by folder and suffix.
        is_fork_safe: whether several processes may read at once, because they share no file position.
    """

    is_fork_safe = False

    def __init__(self, path: Path, suffixes: Sequence[str]) -> None:
        self.path = path
        self.ignored_count = 0
        self.unread: Counter[tuple[str, str]] = Counter()
        self._suffixes = tuple(suffixes)
        self._names: set[str] = set()
        self._unsafe: list[str] = []
        #: By the cleaned name of a link, that which the archive has, and the cleaned name of what it points to.
        self._links: dict[str, tuple[str, str | None]] = {}

    @property
    def names(self) -> list[str]:
        """Paths below the root of the tree, with forward slashes, ascending."""
        return sorted(self._names)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of one of `names`; safe from several threads.

        Raises:
            CorruptImageError: the content is damaged, cut short, or beyond `MAX_MEMBER_BYTES`.
            DataError: the folder or archive is gone or cannot be read.
        """

    def _admit(self, raw_name: str) -> str | None:
        """The clean form of the name of a regular file, or None, counted, where it is passed over."""
        parts = [part for part in raw_name.split("/") if part != "."]
        name = "/".join(parts)
        is_safe = not any(part.startswith(".") or part in ("", "__MACOSX") for part in parts)
        if not is_safe or not f"/{name}".lower().endswith(self._suffixes):
            self.ignored_count += 1
            if {"..", ""} & {*parts} and raw_name.lower().endswith(self._suffixes):
                self._unsafe.append(raw_name)
            if is_safe:
                folder, file = posixpath.split(name)
                self.unread[folder, posixpath.splitext(file)[1].lower()] += 1
            return None
        if name in self._names:
            raise DataError(f"{self.path} holds {name!r} twice; remove one")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self.path}: the file name {name!r} is not UTF-8; rename it") from error
        self._names.add(name)
        return name

    def _note_link(self, raw_name: str, target: str | None) -> None:
        """Of a link and what it points to, from the root of the archive; None: nobody knows."""
        self._links[posixpath.normpath(raw_name)] = raw_name, target and posixpath.normpath(target)

    def _follow_links(self, places: dict[str, Place]) -> None:
        """Gives links that lead to files of this archive the places of these; the others are passed over, aloud.

        Data sets are packed with links in them, and hold the same images in an archive as in the folder.
        """
        if unsafe := self._unsafe:
            _log.warning(
                "%s: passed over %d files, such as %r, whose names are no plain paths below it: pack the folder from inside it",
                self.path, len(unsafe), unsafe[0],
            )  # fmt: skip
        lost = []
        for link, (raw_name, target) in self._links.items():
            for _ in range(_MOST_LINKS):
                if target in places or target not in self._links:
                    break
                target = self._links[target][1]
            # tar writes what it was told to pack twice as a link to itself.
            if target in places and link not in places and self._admit(raw_name) is not None:
                places[link] = places[target]
            elif target not in places:
                lost.append(raw_name)
        self.ignored_count += len(lost)
        # Of a folder, or an image.
        said = [name for name in lost if name.lower().endswith(self._suffixes) or "." not in posixpath.basename(name)]
        if said:
            _log.warning(
                "%s: passed over %d links, such as %r: they lead to folders, to what is no image, or out of it; pack the "
                "files themselves",
                self.path,
                len(said),
                said[0],
            )

    def _check_size(self, name: str, size_bytes: int) -> None:
        if size_bytes > MAX_MEMBER_BYTES:
            raise CorruptImageError(
                f"{self.path}: {name!r} has {size_bytes} bytes; at most {MAX_MEMBER_BYTES} are read: remove it"
            )


class FolderTree(FileTree):
    """A folder. It belongs to the user, so links in it are followed: subsets are often made of them."""

    is_fork_safe = True

    def __init__(self, path: Path, suffixes: Sequence[str]) -> None:
        super().__init__(path, suffixes)
        try:
            lost = []
            for name, is_file in _walk(path, "", _MAX_FOLDER_DEPTH):
                if is_file:
                    self._admit(name)
                else:
                    self.ignored_count += 1
                    lost.append(name)
        except OSError as error:
            raise DataError(f"cannot list folder {path}: {error.strerror}: {error.filename!r}") from error
        if deep := [name for name in lost if name.endswith("/")]:
            _log.warning("%s: passed over %d folders as too deep, such as %r: give a longer path", path, len(deep), deep[0])
        said = sorted(name for name in lost if name.lower().endswith(self._suffixes))
        if said:
            _log.warning(
                "%s: passed over %d images that are no files, such as %r: links that lead nowhere, or pipes; mend or remove "
                "them",
                path,
                len(said),
                said[0],
            )

    def read(self, name: str) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                self._check_size(name, os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise DataError(f"cannot read {self.path / name}: {error.strerror}") from error


class ZipTree(FileTree):
    """A zip archive (or a wheel, which is one)."""

    def __init__(self, path: Path, suffixes: Sequence[str]) -> None:
        super().__init__(path, suffixes)
        self._members: dict[str, zipfile.ZipInfo] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (*_DAMAGE, UnicodeDecodeError) as error:
            raise _damaged_archive(path, error) from error
        except RuntimeError as error:  # written for a later version of zip
            raise DataError(f"{path}: cannot unpack this zip ({error}); pack it anew") from error
        _check_count(path, len(self._zip.infolist()))
        weakref.finalize(self, self._zip.close)
        for info in self._zip.infolist():
            if info.create_system == _WRITTEN_ON_WINDOWS:
                info.filename = info.filename.replace("\\", "/")
            # Not `is_dir`, which fails on an empty name.
            if info.filename.endswith("/"):
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind == stat.S_IFLNK and info.file_size < _LONGEST_PATH:
                self._note_link(info.filename, self._target_of(info))
            elif kind not in (0, stat.S_IFREG):  # 0: the zip was written where files have no such bits
                self.ignored_count += 1
            elif (name := self._admit(info.filename)) is not None:
                self._members[name] = info
        self._follow_links(self._members)

    def _target_of(self, link: zipfile.ZipInfo) -> str | None:
        try:
            return posixpath.join(posixpath.dirname(link.filename), self._zip.read(link).decode())
        except (OSError, *_DAMAGE, UnicodeDecodeError, RuntimeError):
            return None

    def read(self, name: str) -> bytes:
        info = self._members[name]
        self._check_size(name, info.file_size)
        try:
            return self._zip.read(info)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        except _DAMAGE as error:
            raise CorruptImageError(f"{self.path}: {name!r} is damaged ({error}); replace or remove it") from error
        except RuntimeError as error:  # encrypted, or an unknown compression
            raise DataError(f"{self.path}: cannot unpack {name!r} ({error}); pack the zip anew") from error


class TarTree(FileTree):
    """An uncompressed tar: its headers are read once, the files in it on demand.

    Tars in one that holds nothing else, such as those of the classes in ImageNet's training images, are folders of it.
    """

    is_fork_safe = True

    def __init__(self, path: Path, suffixes: Sequence[str]) -> None:
        super().__init__(path, suffixes)
        self._spans: dict[str, Span] = {}
        try:
            with tarfile.open(path, "r:", tarinfo=_BoundedTarInfo) as tar:
                for member, name in _regular_members(tar, self):
                    self._spans[name] = Span(member.offset_data, member.size)
                if not self._names:
                    self._read_tars_within(tar)
            self._follow_links(self._spans)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except _TAR_DAMAGE as error:
            raise _damaged_archive(path, error) from error

    def _read_tars_within(self, tar: tarfile.TarFile) -> None:
        for whole in tar.getmembers():
            folder, suffix = posixpath.splitext(whole.name)
            if not whole.isreg() or suffix.lower() != ".tar":
                continue
            try:
                with tarfile.open(fileobj=tar.extractfile(whole), mode="r:", tarinfo=_BoundedTarInfo) as within:
                    for member, name in _regular_members(within, self, folder=folder):
                        self._spans[name] = Span(whole.offset_data + member.offset_data, member.size)
            except _TAR_DAMAGE as error:
                raise _damaged_archive(self.path / whole.name, error) from error
            # It was passed over before.
            self.ignored_count -= 1
            self.unread.pop((posixpath.dirname(folder), ".tar"), None)

    def read(self, name: str) -> bytes:
        span = self._spans[name]
        self._check_size(name, span.size_bytes)
        try:
            # Opened anew each time, so that threads and forked processes share no file position.
            with open(self.path, "rb") as file:
                file.seek(span.offset)
                data = file.read(span.size_bytes)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) < span.size_bytes:
            raise CorruptImageError(f"{self.path}: {name!r} is cut short; copy the archive anew")
        return data


class SpooledTree(FileTree):
    """Files that can be read in one order only, and are put into `spool` as they come."""

    def __init__(self, path: Path, suffixes: Sequence[str], spool: Spool) -> None:
        super().__init__(path, suffixes)
        self._spool = spool
        self._spans: dict[str, Span] = {}
        self._oversized: dict[str, int] = {}

    def _put(self, name: str, content: bytes) -> None:
        """Keeps a file; of one that is too large its size, which reading it says."""
        if len(content) > MAX_MEMBER_BYTES:
            self._oversized[name] = len(content)
        else:
            self._spans[name] = self._spool.append(content)

    def read(self, name: str) -> bytes:
        if name in self._oversized:
            self._check_size(name, self._oversized[name])
        return self._spool.read(self._spans[name])


class CompressedTarTree(SpooledTree):
    """A compressed tar: streamed once."""

    def __init__(self, path: Path, suffixes: Sequence[str], spool: Spool) -> None:
        super().__init__(path, suffixes, spool)
        decompress = next(open_ for suffix, open_ in _DECOMPRESSORS.items() if path.name.lower().endswith(suffix))
        try:
            most = most_unpacked_bytes(path)
            with decompress(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_BoundedTarInfo) as tar:
                for member, name in _regular_members(tar, self, most):
                    if member.size > MAX_MEMBER_BYTES:
                        self._oversized[name] = member.size
                    else:
                        self._put(name, tar.extractfile(member).read())
                self._follow_links(self._spans)
                while stream.read(1 << 20):  # to the end, where the checksum of the compression lies
                    pass
        except _TAR_DAMAGE as error:
            raise _damaged_archive(path, error) from error
        except OSError as error:
            if error.errno is None:  # not from the system: bz2 says so of damaged content
                raise _damaged_archive(path, error) from error
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_tree(path: Path, suffixes: Sequence[str], spool: Spool) -> FileTree:
    """The files below a folder or in an archive that end in one of the lower-case `suffixes`.

    Raises:
        DataError: `path` is neither a folder nor an archive of a known kind, or cannot be read to
            its end, or holds a file twice.
    """
    name = path.name.lower()
    # A pipe would have us wait.
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise DataError(f"{path} is neither a folder nor a file")
    if path.is_dir():
        return FolderTree(path, suffixes)
    if name.endswith((".zip", ".whl")):
        return ZipTree(path, suffixes)
    if name.endswith(".tar"):
        return TarTree(path, suffixes)
    if name.endswith(tuple(_DECOMPRESSORS)):
        return CompressedTarTree(path, suffixes, spool)
    suffixes = ", ".join(ARCHIVE_SUFFIXES)
    raise DataError(f"{path} is neither a folder nor an archive; archives end in {suffixes}, .parquet, .npz, .npy or .mat")


def _walk(root: Path, below: str, depth: int) -> Iterator[tuple[str, bool]]:
    """What lies in a folder, of folders the too deep, and whether it is a file: links may lead nowhere, pipes may never end."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                is_folder = is_file = False
            if is_folder:
                if entry.name.startswith("."):
                    continue
                if depth > 0:
                    yield from _walk(root, f"{below}{entry.name}/", depth - 1)
                else:
                    yield f"{below}{entry.name}/", False
            else:
                yield f"{below}{entry.name}", is_file


def _regular_members(
    tar: tarfile.TarFile, tree: FileTree, most_bytes: float = math.inf, folder: str = ""
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The files of a tar that `tree` admits, with their names there: in `folder`."""
    for member in tar:
        if member.offset_data + member.size > most_bytes:
            raise DataError(f"{tree.path} unpacks to more than {most_bytes} bytes: unpack it yourself if you trust it")
        if member.isdir():
            continue
        if member.islnk() or member.issym():
            above = "" if member.islnk() else posixpath.dirname(member.name)
            tree._note_link(posixpath.join(folder, member.name), posixpath.join(folder, above, member.linkname))
            continue
        if not member.isreg() or member.issparse():
            tree.ignored_count += 1
        elif (name := tree._admit(posixpath.join(folder, member.name))) is not None:
            yield member, name
    # Some programs write none, and GNU tar does not mind; a download that broke off between two files has none either.
    if tar.fileobj.tell() == tar.offset:
        _log.warning("%s ends without the mark of its end: if files are missing, copy or download it anew", tree.path / folder)
    elif any(block.strip(b"\0") for block in iter(lambda: tar.fileobj.read(1 << 20), b"")):
        _log.warning(
            "%s goes on behind the mark of its end, where nothing is read: several tars joined into one, or a download with "
            "holes; give each tar by its name, or download it anew", tree.path / folder,
        )  # fmt: skip


def _check_count(path: Path, found: int) -> None:
    """A damaged entry of a zip's directory may take in those after it, which zipfile would not miss."""
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, _LONGEST_ZIP_END), os.SEEK_END)
        end = file.read()
    counted = end[end.rindex(b"PK\5\6") :][10:12]
    # Large archives say it elsewhere.
    if counted != b"\xff\xff" and int.from_bytes(counted, "little") != found % (1 << 16):
        raise _damaged_archive(path, zipfile.BadZipFile(f"{found} files in its directory, which says another number of them"))


def _damaged_archive(path: Path, error: Exception) -> DataError:
    kind = "zip" if isinstance(error, zipfile.BadZipFile) else "tar"
    return DataError(f"{path} is damaged, cut short or no {kind} archive ({error}); copy or download it anew")

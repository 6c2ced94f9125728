"""Compares the length that the header of an audio file claims with the bytes of the file.

libsndfile believes headers, and headers can be wrong. A program that writes to a pipe leaves 0 or the highest number. A
killed recorder leaves a length that is too small. Joined files keep the length of the first. MP3 of variable bit rate
often has none.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, NamedTuple

UNKNOWN_BYTES = 0x7FFF0000  # a file that was written to a pipe claims at least this size
ENDS = 1 << 16  # bytes read at both ends of the part behind the audio, to tell filling zeros from more audio
TAIL = 1 << 17  # bytes at the end of a file, in which the last FLAC frame begins
KBPS = (  # of MP3's layer III: MPEG 1, then 2 and 2.5
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
MOST_CHUNKS = 1000  # before the audio's chunk
LARGEST_FRAME = 1441  # bytes of an MP3 frame
RESYNC = 3 * LARGEST_FRAME + 4096  # bytes searched for the first MP3 frames
MP3_RATES = (44_100, 48_000, 32_000)  # hertz of MPEG 1; MPEG 2 has half of it, MPEG 2.5 a quarter


class RefusedAudio(OSError):
    """Audio that cannot be read or must not be used. `reason` is a short phrase; skipped utterances are counted by it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Claim:
    """The error in the length that a header claims, and the repair of a header that leaves its length open.

    missing:   claimed audio that the file lacks, as a fraction of libsndfile's frame count; below 0: unclaimed audio
    at, patch: `patch` replaces the header's bytes from position `at` on and fills in the length
    prefix:    replaces all bytes before `at` for the same purpose
    """

    missing: float = 0.0
    at: int = 0
    patch: bytes = b""
    prefix: bytes = b""

    def mended(self, content: bytes) -> bytes:
        """The bytes of the file with the repaired header."""
        if not self.patch and not self.prefix:
            return content
        return (self.prefix or content[: self.at]) + self.patch + content[self.at + len(self.patch) :]


def claim_of(file: BinaryIO, size: int) -> Claim:
    """The claim of a file of `size` bytes; an empty claim for unknown formats and broken headers. Raises RefusedAudio."""
    try:
        first = read_at(file, 0, 4)
        start = 0
        if first[:3] == b"ID3":
            tag = read_at(file, 0, 10)
            start = 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])  # seven bits of each byte count
            first = read_at(file, start, 4)
        if first == b"fLaC":
            return flac_claim(file, start, size)
        if first == b"OggS":
            return ogg_claim(file, size)
        if other := other_format(read_at(file, start, 12)):
            raise RefusedAudio("unreadable audio", f"{other}, which libsndfile does not read; convert it to FLAC")
        if data := data_of(file, first):
            return data.claim(file, size)
        found = mp3_start(read_at(file, start, RESYNC))
        return Claim() if found is None else mp3_claim(file, start + found, size)
    except (struct.error, ValueError, IndexError):
        return Claim()


def read_at(file: BinaryIO, at: int, number: int) -> bytes:
    file.seek(at)
    return file.read(number)


def other_format(first: bytes) -> str | None:
    """The name of a common format that libsndfile does not read."""
    if first[4:8] == b"ftyp":
        return "MP4 or M4A"
    beginnings = {
        b"\x1aE\xdf\xa3": "WebM or Matroska",
        b"0&\xb2u": "WMA",
        b"#!AM": "AMR",
        b"wvpk": "WavPack",
        b"MAC ": "APE",
    }
    is_adts = first[:1] == b"\xff" and first[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9")
    return "AAC" if is_adts else beginnings.get(first[:4])


# --- uncompressed audio


class Layout(NamedTuple):
    """The layout of a file of chunks: byte order, position of the first chunk, sizes in bytes, name of the audio's chunk.

    extra: bytes that the size of the audio's chunk includes besides the audio; in W64 this is the chunk's header
    """

    order: str
    first: int
    name: int
    size: int
    alignment: int
    audio: bytes
    extra: int


LAYOUTS = {
    b"RIFF": Layout("<", 12, 4, 4, 2, b"data", 0),
    b"RIFX": Layout(">", 12, 4, 4, 2, b"data", 0),
    b"RF64": Layout("<", 12, 4, 4, 2, b"data", 0),
    b"BW64": Layout("<", 12, 4, 4, 2, b"data", 0),
    b"FORM": Layout(">", 12, 4, 4, 2, b"SSND", 8),
    b"caff": Layout(">", 8, 4, 8, 1, b"data", 4),
    b"riff": Layout("<", 40, 16, 8, 8, b"data", 24),
}


@dataclass(frozen=True)
class Data:
    """The audio of a file: its first byte and claimed size. The header stores size plus `extra` at `size_at` as `form`."""

    start: int
    claimed: int
    size_at: int
    form: str
    extra: int = 0
    alignment: int = 0  # of the next chunk; 0: no chunk may follow
    counts_all: bool = False  # True if libsndfile ignores the claim and reads to the end of the file

    def claim(self, file: BinaryIO, size: int) -> Claim:
        room = size - self.start
        is_open = self.claimed <= 0 or room < self.claimed >= UNKNOWN_BYTES
        end = self.start + max(0, self.claimed)
        tail = read_at(file, end, ENDS) + read_at(file, max(end, size - ENDS), ENDS)
        follows = self.claimed < room and not self.is_end(tail, -end % (self.alignment or 1))
        if is_open and (follows or self.claimed > 0):
            most = (1 << 8 * struct.calcsize(self.form)) - 1
            patch = struct.pack(self.form, min(room + self.extra, most)) if self.form else b""
            return Claim(at=self.size_at, patch=patch)
        found = room if follows or self.claimed > room else self.claimed
        counted = found if self.counts_all else min(self.claimed, found)
        return Claim((self.claimed - found) / max(1, counted))

    def is_end(self, tail: bytes, pad: int) -> bool:
        """True if the audio is followed by a chunk with a printable name, by filling zeros or by nothing."""
        names = [tail[at : at + 4] for at in (0, pad)] if self.alignment else []
        is_chunk = any(name.isascii() and name.decode().isprintable() and name not in LAYOUTS for name in names)
        return is_chunk or not tail.strip(b"\0")


def data_of(file: BinaryIO, first: bytes) -> Data | None:
    if first in LAYOUTS:
        return chunk_of(file, LAYOUTS[first])
    if first in (b".snd", b"dns."):
        form = ">I" if first == b".snd" else "<I"
        start, claimed = (struct.unpack(form, read_at(file, at, 4))[0] for at in (4, 8))
        return Data(start, claimed, 8, form)
    if first == b"NIST":
        start = int(read_at(file, 8, 8))
        lines = (line.split() for line in read_at(file, 0, start).decode("latin-1").splitlines())
        fields = {line[0]: line[2] for line in lines if len(line) == 3}
        names = ("sample_count", "channel_count", "sample_n_bytes")
        count, channels, width = (int(fields.get(name, 0)) for name in names)
        return Data(start, count * channels * width, 0, "", counts_all=True)
    return None


def chunk_of(file: BinaryIO, layout: Layout) -> Data | None:
    """The audio's chunk. RF64 stores its size in an earlier chunk. Raises struct.error if the file ends before it."""
    form = layout.order + ("I" if layout.size == 4 else "q")
    at, long, is_w64 = layout.first, None, layout.name == 16
    for _ in range(MOST_CHUNKS):
        start = at + layout.name + layout.size
        name = read_at(file, at, 4)
        length = struct.unpack(form, read_at(file, at + layout.name, layout.size))[0]
        if name == b"ds64":
            long = struct.unpack("<q", read_at(file, start + 8, 8))[0], start + 8, "<q"
        if name == layout.audio:
            value, place, kind = long if long and length == 0xFFFFFFFF else (length, at + layout.name, form)
            begins = start if is_w64 else start + layout.extra
            return Data(begins, value - layout.extra, place, kind, layout.extra, layout.alignment, is_w64)
        end = start + length - (layout.extra if is_w64 else 0)
        if end < start:
            return None
        at = end + -end % layout.alignment
    return None


# --- FLAC


def flac_claim(file: BinaryIO, start: int, size: int) -> Claim:
    """Compares the number of samples in the header with the end of the last frame; repairs a header of 0 samples."""
    info = read_at(file, start + 8, 18)
    [fields] = struct.unpack(">Q", info[10:18])
    claimed, block = fields & (1 << 36) - 1, struct.unpack(">H", info[:2])[0]
    largest = int.from_bytes(info[7:10], "big")  # bytes of a frame; 0: unknown
    frames = last_frames(file, start, size, block, 3 * largest) or last_frames(file, start, size, block, TAIL)
    ends = {frame.stop for frame in frames}
    found = max((frame.stop for frame in frames if frame.start in ends or len(frames) == 1), default=0)
    if not claimed:
        if not found:
            raise RefusedAudio("unreadable audio", "FLAC without a frame at its end")
        return Claim(at=start + 18, patch=struct.pack(">Q", fields | found))
    return Claim() if not found or claimed in ends else Claim((claimed - found) / claimed)


def last_frames(file: BinaryIO, start: int, size: int, block: int, number: int) -> list[range]:
    """The sample range of each frame that begins in the last `number` bytes."""
    tail = read_at(file, max(start + 42, size - number), number)
    starts = [match.start() for match in re.finditer(b"\xff[\xf8\xf9]", tail)]
    return [frame for at in starts if (frame := samples_of_frame(tail[at : at + 16].ljust(16, b"\0"), block))]


def samples_of_frame(header: bytes, block: int) -> range | None:
    """The sample range of a frame, None for other bytes (RFC 9639, 9.1). block: samples of a frame of fixed size"""
    if header[3] & 1 or not header[2] >> 4:
        return None
    num_more = max(0, 7 - (header[4] ^ 0xFF).bit_length())  # further bytes of the number, as in UTF-8
    number = header[4] & (0x7F >> num_more)
    for byte in header[5 : 5 + num_more]:
        number = number << 6 | byte & 0x3F
    at, code = 5 + num_more, header[2] >> 4
    explicit = {6: 1, 7: 2}.get(code, 0)
    samples = 192 if code == 1 else 144 << code if code < 6 else 1 << code
    if explicit:
        samples = int.from_bytes(header[at : at + explicit], "big") + 1
    at += explicit + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    first = number if header[1] & 1 else number * block
    return range(first, first + samples) if at < 16 and crc8(header[:at]) == header[at] else None


def crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x107 if crc & 0x80 else 0)) & 0xFF
    return crc


# --- OGG


def ogg_claim(file: BinaryIO, size: int) -> Claim:
    """Raises RefusedAudio if the last page is cut off, or if a second stream follows: libsndfile would not read it."""
    at, is_in_stream = 0, False
    while at < size and (page := read_at(file, at, 27)).startswith(b"OggS"):
        sizes = file.read(page[26]) if len(page) == 27 else b""
        if len(page) < 27 or len(sizes) < page[26] or (end := at + 27 + len(sizes) + sum(sizes)) > size:
            raise RefusedAudio("truncated audio", "the last page of OGG is cut off")
        begins_stream = bool(page[5] & 2)
        if begins_stream and is_in_stream:
            wrong = f"libsndfile reads nothing of OGG from byte {at:,} on; convert it to FLAC"
            raise RefusedAudio("several streams in one file", wrong)
        at, is_in_stream = end, is_in_stream or not begins_stream
    return Claim()


# --- MP3


class Frame(NamedTuple):
    """An MP3 frame: its bytes, samples and bit rate, and the position of a Xing header in it."""

    size: int
    samples: int
    kbps: int
    xing: int


def mp3_frame(header: bytes) -> Frame | None:
    """The frame of layer III with this header of four bytes; None for other bytes."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, rate, kbps = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or rate == 3 or kbps in (0, 15):
        return None
    is_first, is_mono = version == 3, header[3] >> 6 == 3
    samples, bits = 1152 if is_first else 576, KBPS[not is_first][kbps]
    hertz = MP3_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    size = samples // 8 * bits * 1000 // hertz + (header[2] >> 1 & 1)
    return Frame(size, samples, bits, 4 + (17 if is_first == is_mono else 32 if is_first else 9))


def mp3_start(content: bytes) -> int | None:
    """The position of the first three frames in a row. A recorded stream may begin in the middle of a frame."""
    for match in re.finditer(b"\xff[\xe2-\xff]", content):
        if len(list(islice(mp3_frames(content[match.start() :]), 3))) == 3:
            return match.start()
    return None


def mp3_claim(file: BinaryIO, start: int, size: int) -> Claim:
    """Compares the bytes that the Xing header claims with the file; without a Xing header, counts the frames."""
    frame = mp3_frame(read_at(file, start, 4))
    assert frame is not None
    tag = read_at(file, start + frame.xing, 16)
    if tag[:4] not in (b"Xing", b"Info"):
        return counted_mp3(file, start, size, frame)
    [claimed] = struct.unpack(">I", tag[12:16])
    if tag[7] & 3 != 3 or not claimed:  # it does not give both frames and bytes
        return Claim()
    tail = read_at(file, start + claimed, 4)
    is_audio = tail[:3] == b"ID3" or mp3_frame(tail) is not None
    return Claim((claimed - (size - start if is_audio else min(claimed, size - start))) / claimed)


def counted_mp3(file: BinaryIO, start: int, size: int, first: Frame) -> Claim:
    """Adds a Xing header to MP3 of variable bit rate; without one, libsndfile guesses the length by the first frame."""
    content = read_at(file, start, size - start)
    frames = list(mp3_frames(content))
    if len({frame.kbps for frame in frames}) < 2:
        return Claim()
    rest = content[sum(frame.size for frame in frames) :]
    if len(rest) > LARGEST_FRAME and rest.lstrip(b"\0")[:3] not in (b"", b"TAG", b"APE", b"ID3", b"LYR"):
        raise RefusedAudio("undecodable audio", f"MP3 that breaks off after {len(frames):,} frames")
    header = bytes([content[0], content[1] | 1, *content[2:4]])
    xing = header.ljust(first.xing, b"\0") + b"Xing" + struct.pack(">II", 1, len(frames))
    return Claim(at=start, prefix=xing.ljust(first.size, b"\0"))


def mp3_frames(content: bytes) -> Iterator[Frame]:
    """Yields the complete frames from the beginning on."""
    at = 0
    while (frame := mp3_frame(content[at : at + 4])) and at + frame.size <= len(content):
        yield frame
        at += frame.size

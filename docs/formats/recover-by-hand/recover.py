#!/usr/bin/env python3
"""Recover the disks of a machine from a Landfall store, with nothing but the store.

    recover.py STORE list [--json]
    recover.py STORE LINEAGE POINT OUTDIR [--raw] [--journal-only]

STORE is a folder (backend dir), or the URL of an account or of the emulator with a SAS that may read and list:
https://ACCOUNT.blob.core.windows.net/?sv=...&sig=...  or  http://127.0.0.1:10000/devstoreaccount1?sv=...

Written from docs/formats alone, as a second reader of the formats: it shares no code with Landfall. Python 3.9 or later, standard
library only; the program zstd must be there if a segment holds Zstandard frames. It only reads the store.
"""
import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import time
import uuid

SECTOR = 512
MIB = 1 << 20
FRAME = 65536


class Bad(Exception):
    """Something stored is missing or wrong; names the object."""

    def __init__(self, obj, what):
        super().__init__("%s: %s" % (obj, what))


class Missing(Bad):
    def __init__(self, obj):
        super().__init__(obj, "not there")


class WrongLink(Bad):
    """A manifest's prev is not the hash of the one below."""


# ---------------------------------------------------------------- CRC-32C

POLY = 0x82F63B78  # bit 31 is x^0, as CRC-32C counts


def _crc_byte(i):
    for _ in range(8):
        i = (i >> 1) ^ (POLY if i & 1 else 0)
    return i


CRC = [_crc_byte(i) for i in range(256)]
POWERS = {}  # of x, by number of bits


def _mul(a, b):
    """a times b modulo the polynomial."""
    r, m = 0, 1 << 31
    while a:
        if a & m:
            r ^= b
            a ^= m
        m >>= 1
        b = (b >> 1) ^ (POLY if b & 1 else 0)
    return r


def _power(bits):
    if bits not in POWERS:
        r, sq, n = 1 << 31, 1 << 30, bits
        while n:
            if n & 1:
                r = _mul(sq, r)
            sq = _mul(sq, sq)
            n >>= 1
        POWERS[bits] = r
    return POWERS[bits]


def crc32c(data):
    """CRC-32C. Long data is first folded in halves: front * x^len(back) + back has the same rest as the whole, and
    times x^len modulo the polynomial is a few shifts of one long integer, which Python does fast."""
    n, crc = len(data), 0xFFFFFFFF
    if n > 512:
        m, crc = int.from_bytes(data, "little") ^ 0xFFFFFFFF, 0
        while n > 256:
            half = 1 << ((n - 9).bit_length() - 1)  # so that n - back <= half
            back = half + 8
            front = n - back
            low, times = m & ((1 << 8 * front) - 1), _power(8 * back)
            m >>= 8 * front
            gap = 8 * (back - front) - 31
            while times:
                bit = times & -times
                m ^= low << (gap + bit.bit_length() - 1)
                times ^= bit
            n = back
        data = m.to_bytes(n, "little")
    for b in data:
        crc = CRC[(crc ^ b) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# ---------------------------------------------------------------- stores

class DirStore:
    """The folder store: docs/formats/dir-store.md."""

    def __init__(self, root):
        self.root = root
        path = os.path.join(root, "format.json")
        try:
            with open(path, "rb") as f:
                form = json.load(f)
        except (OSError, ValueError) as e:
            raise Bad(path, "no store here: %s" % e)
        if form.get("format") != "landfall-dir-store" or form.get("version") != 1:
            raise Bad(path, "unknown format or version: %r" % form)

    @staticmethod
    def _enc(name):
        return re.sub("[A-Z]", lambda m: "+" + m.group().lower(), name)

    @staticmethod
    def _dec(name):
        return re.sub(r"\+(.)", lambda m: m.group(1).upper(), name)

    def _path(self, container, name, tail):
        return os.path.join(self.root, "containers", container, *(self._enc(name) + tail).split("/"))

    def containers(self, prefix):
        try:
            names = os.listdir(os.path.join(self.root, "containers"))
        except FileNotFoundError:
            return []
        return sorted(n for n in names if n.startswith(prefix))

    def list(self, container, folder):
        """Names of the block blobs under folder (which ends in a slash)."""
        top = os.path.join(self.root, "containers", container)
        out = []
        for at, _, files in os.walk(os.path.join(top, *folder.rstrip("/").split("/"))):
            rel = os.path.relpath(at, top).replace(os.sep, "/")
            out += [self._dec(rel + "/" + f[:-2]) for f in files if f.endswith("@b")]
        return sorted(out)

    def get(self, container, name):
        self.last = container + "/" + name
        try:
            with open(self._path(container, name, "@b"), "rb") as f:
                return f.read()
        except FileNotFoundError:
            raise Missing(container + "/" + name)

    def snapshot(self, container, name, snap):
        """(size, metadata, read(offset, length), ranges) of a snapshot of a page blob."""
        at = os.path.join(self._path(container, name, "@p"), "snap", snap)
        try:
            with open(os.path.join(at, "meta.json"), "rb") as f:
                meta = json.load(f)
            data = open(os.path.join(at, "data"), "rb")
        except FileNotFoundError:
            raise Missing("%s/%s snapshot %s" % (container, name, snap))
        if meta.get("v") != 1:
            raise Bad(at, "unknown version of meta.json")

        def read(off, n):
            return os.pread(data.fileno(), n, off)

        def ranges():
            end, at = meta["size"], 0
            while at < end:
                try:
                    start = os.lseek(data.fileno(), at, os.SEEK_DATA)
                    at = os.lseek(data.fileno(), start, os.SEEK_HOLE)
                except AttributeError:  # no holes on this system
                    start, at = at, end
                except OSError:  # nothing but a hole to the end
                    return
                yield start, min(at, end)

        return meta["size"], {k.lower(): v for k, v in (meta.get("metadata") or {}).items()}, read, ranges


class HTTPStore:
    """Azure Blob storage, or Azurite, by plain HTTP with a SAS."""

    def __init__(self, url):
        global ET, http, urllib  # imported only here: a folder does not need them
        import http.client
        import urllib.error
        import urllib.parse
        import urllib.request
        import xml.etree.ElementTree as ET
        u = urllib.parse.urlsplit(url)
        self.base = urllib.parse.urlunsplit((u.scheme, u.netloc, u.path.rstrip("/"), "", ""))
        self.sas = u.query

    def _call(self, path, query, headers=None, method="GET"):
        q = "&".join([urllib.parse.urlencode(query), self.sas]).strip("&")
        url = "%s/%s?%s" % (self.base, urllib.parse.quote(path), q)
        for attempt in range(5):
            try:
                req = urllib.request.Request(url, headers=headers or {}, method=method)
                with urllib.request.urlopen(req, timeout=120) as r:
                    return r.headers, r.read()
            except urllib.error.HTTPError as e:
                if e.code == 404:
                    raise Missing(path)
                if e.code not in (408, 429, 500, 502, 503, 504) or attempt == 4:
                    raise Bad(path or self.base, "HTTP %d %s" % (e.code, e.headers.get("x-ms-error-code", "")))
            except (OSError, http.client.HTTPException) as e:
                if attempt == 4:
                    raise Bad(path or self.base, str(e))
            time.sleep(1 << attempt)

    def _pages(self, path, query, tag):
        marker = ""
        while True:
            q = dict(query, **({"marker": marker} if marker else {}))
            root = ET.fromstring(self._call(path, q)[1])
            for n in root.iter(tag):
                yield n
            marker = root.findtext("NextMarker") or ""
            if not marker:
                return

    def containers(self, prefix):
        return sorted(n.findtext("Name") for n in self._pages("", {"comp": "list", "prefix": prefix}, "Container"))

    def list(self, container, folder):
        q = {"restype": "container", "comp": "list", "prefix": folder}
        try:
            return sorted(n.findtext("Name") for n in self._pages(container, q, "Blob"))
        except Missing:
            return []

    def get(self, container, name):
        self.last = container + "/" + name
        return self._call(container + "/" + name, {})[1]

    def snapshot(self, container, name, snap):
        path, q = container + "/" + name, {"snapshot": snap}
        try:
            head, _ = self._call(path, q, method="HEAD")
        except Missing:
            raise Missing("%s snapshot %s" % (path, snap))
        meta = {k[10:].lower(): v for k, v in head.items() if k.lower().startswith("x-ms-meta-")}

        def read(off, n):
            return self._call(path, q, {"x-ms-range": "bytes=%d-%d" % (off, off + n - 1)})[1]

        def ranges():
            for n in self._pages(path, dict(q, comp="pagelist"), "PageRange"):
                yield int(n.findtext("Start")), int(n.findtext("End")) + 1

        return int(head["Content-Length"]), meta, read, ranges


def open_store(where):
    return HTTPStore(where) if re.match("https?://", where) else DirStore(where)


# ---------------------------------------------------------------- JSON records

def parse(obj, raw, version, known):
    """A JSON object of a version and with fields that we know, or refuse."""
    try:
        v = json.loads(raw.decode("utf-8"))
    except ValueError as e:
        raise Bad(obj, "not JSON: %s" % e)
    if not isinstance(v, dict) or v.get("v") not in version:
        raise Bad(obj, "unknown version")
    unknown = set(v) - set(known.split())
    if unknown:
        raise Bad(obj, "unknown fields %s" % ", ".join(sorted(unknown)))
    return v


MANIFEST = "v lineage epoch open seq prev kind point pass base failover cut_time consistency config disks host reason trace"


class Lineage:
    """The chain of one lineage: manifests, retention record, checkpoints."""

    def __init__(self, store, lineage):
        self.store, self.id = store, lineage
        self.j, self.s, self.r = "lfj-" + lineage, "lfs-" + lineage, "lfr-" + lineage
        self._record()
        self._chain()
        self._checkpoints()

    def _record(self):
        obj = self.r + "/retention.json"
        try:
            raw = self.store.get(self.r, "retention.json")
        except Missing:
            rec = {}
        else:
            rec = parse(obj, raw, (1,), "v lineage floor anchor no_checkpoint retired released pins keep")
            if rec.get("lineage") != self.id:
                raise Bad(obj, "of another lineage")
        self.floor = rec.get("floor", 0)
        self.retired = []  # (from, to, anchor, checkpoint at to counts), the floor first
        if self.floor:
            self.retired.append((1, self.floor, rec.get("anchor"), not rec.get("no_checkpoint")))
        for r in rec.get("retired") or []:
            self.retired.append((r["from"], r["to"], r.get("anchor"), not r.get("no_checkpoint")))
        last = 0
        for lo, hi, anchor, _ in self.retired:
            if lo <= last or hi < lo or not anchor or anchor.get("seq") != hi:
                raise Bad(obj, "ranges or anchors do not fit")
            last = hi
        self.released = [(r["from"], r["to"]) for r in rec.get("released") or []]

    def gone(self, seq):
        """The retired range that seq lies in, or None."""
        for r in self.retired:
            if r[0] <= seq <= r[1]:
                return r

    def _chain(self):
        found = set()
        for name in self.store.list(self.j, "log/"):
            m = re.fullmatch(r"log/(\d{12})\.json", name)
            if m and not self.gone(int(m.group(1))):
                found.add(int(m.group(1)))
        self.head = max(found, default=self.retired[-1][1] if self.retired else 0)
        self.manifests, self.first, self.damage = {}, {}, ""
        prev, epoch, seq = "", 0, 1
        while seq <= self.head:
            cut = self.gone(seq)
            if cut:
                a = cut[2]
                prev, epoch, seq = a["sha256"], a["epoch"], cut[1] + 1
                for d in a.get("disks") or []:
                    self.first.setdefault((d["id"], d["gen"]), d["first"])
                continue
            try:
                m, sha = self._manifest(seq, prev, epoch, seq in found)
            except Bad as e:  # what is below can be read all the same
                self.damage = str(e)
                self.head = seq - 1
                if isinstance(e, WrongLink) and self.head in self.manifests:  # that one or this one was changed
                    del self.manifests[self.head]
                    self.head -= 1
                return
            for d in m.get("disks") or []:
                self.first.setdefault((d["id"], d["gen"]), seq)
            self.manifests[seq] = m
            prev, epoch, seq = sha, m["epoch"], seq + 1

    def _manifest(self, seq, prev, epoch, there):
        name = "log/%012d.json" % seq
        obj = self.j + "/" + name
        if not there:
            raise Bad(obj, "the chain has a gap: manifest %d is there, this one is not" % self.head)
        raw = self.store.get(self.j, name)
        m = parse(obj, raw, (1, 2), MANIFEST + " signals")
        if m["v"] == 1 and "signals" in m:
            raise Bad(obj, "unknown fields signals")
        if m.get("lineage") != self.id or m.get("seq") != seq:
            raise Bad(obj, "it is manifest %s of lineage %s" % (m.get("seq"), m.get("lineage")))
        if m.get("prev", "") != prev:
            raise WrongLink(obj, "prev is not the hash of the manifest below")
        if m["epoch"] < epoch:
            raise Bad(obj, "the epoch falls")
        if m["kind"] not in ("base", "point", "partial", "rewind", "close", "open"):
            raise Bad(obj, "unknown kind %r" % m["kind"])
        return m, hashlib.sha256(raw).hexdigest()

    def _checkpoints(self):
        self.checkpoints = {}
        for name in self.store.list(self.r, "ckpt/"):
            m = re.fullmatch(r"ckpt/(\d{12})\.json", name)
            if not m:
                continue
            seq = int(m.group(1))
            cut = self.gone(seq)
            if cut and not (seq == cut[1] and cut[3]):
                continue  # given up
            obj = self.r + "/" + name
            try:
                c = parse(obj, self.store.get(self.r, name), (1,), "v lineage seq kind ordinal void created disks")
            except Missing:
                continue  # deleted meanwhile
            if c.get("lineage") != self.id or c.get("seq") != seq:
                raise Bad(obj, "it says lineage %s, manifest %s" % (c.get("lineage"), c.get("seq")))
            if not c.get("void") and seq <= self.head:
                self.checkpoints[seq] = {(d["id"], d["gen"]): d for d in c["disks"]}

    def points(self):
        return [m for _, m in sorted(self.manifests.items()) if m["kind"] in ("base", "point") and self.reachable(m)]

    def starts(self, disk, gen, upto, journal_only=False):
        """Where replay of a disk may begin, best first: a checkpoint's manifest, or 0 and the first manifest that named it."""
        starts = []
        if not journal_only:
            starts = [c for c in sorted(self.checkpoints, reverse=True) if c <= upto and (disk, gen) in self.checkpoints[c]]
        starts = [(c, c + 1) for c in starts]
        if (disk, gen) in self.first:
            starts.append((0, self.first[disk, gen]))
        return [s for s in starts if self._whole(disk, gen, s[1], upto)]

    def _whole(self, disk, gen, lo, hi):
        if any(r[0] <= hi and lo <= r[1] for r in self.retired):
            return False
        return not any(r[0] <= hi and lo <= r[1] for r in self.released)

    def reachable(self, m, journal_only=False):
        return all(self.starts(d["id"], d["gen"], m["seq"], journal_only) for d in m["disks"])

    def config(self, m):
        """The VM's description at a point; {} if the point has none."""
        if not m.get("config"):
            return {}
        name = "config/%s.json" % m["config"]
        raw = self.store.get(self.j, name)
        if hashlib.sha256(raw).hexdigest() != m["config"]:
            raise Bad(self.j + "/" + name, "its SHA-256 is not its name")
        return json.loads(raw.decode("utf-8"))


# ---------------------------------------------------------------- segments

def uvarint(obj, b, at):
    v = shift = 0
    while True:
        if at >= len(b) or shift > 63:
            raise Bad(obj, "a number in it does not end")
        c = b[at]
        at += 1
        v |= (c & 0x7F) << shift
        if c < 0x80:
            return v, at
        shift += 7


def s2_decode(obj, i, b):
    """An S2 block: Snappy's, with repeated offsets and long copies (docs/formats/segment.md)."""
    size, s = uvarint(obj, b, 0)
    if size > FRAME:
        raise Bad(obj, "frame %d: an S2 block of %d bytes" % (i, size))
    out, offset = bytearray(), 0
    try:
        while s < len(b):
            tag = b[s]
            s += 1
            kind, n = tag & 3, tag >> 2
            if kind == 0:
                if n >= 60:
                    k = n - 59
                    n = int.from_bytes(b[s:s + k], "little")
                    s += k
                n += 1
                if s + n > len(b):
                    raise IndexError
                out += b[s:s + n]
                s += n
                continue
            if kind == 1:
                n &= 7
                to = (tag & 0xE0) << 3 | b[s]
                s += 1
                if to:
                    offset = to
                elif n >= 5:  # repeat the last offset, length in 1 to 3 bytes
                    k = n - 4
                    n = int.from_bytes(b[s:s + k], "little") + (4, 1 << 8, 1 << 16)[k - 1]
                    if s + k > len(b):
                        raise IndexError
                    s += k
                n += 4
            else:
                k = 2 if kind == 2 else 4
                offset = int.from_bytes(b[s:s + k], "little")
                if s + k > len(b):
                    raise IndexError
                s += k
                n += 1
            if offset < 1 or offset > len(out) or len(out) + n > size:
                raise IndexError
            if offset >= n:
                out += out[len(out) - offset:len(out) - offset + n]
            else:
                unit = bytes(out[-offset:])
                out += (unit * (n // offset + 1))[:n]
    except IndexError:
        raise Bad(obj, "frame %d: the S2 block is damaged" % i)
    if len(out) != size:
        raise Bad(obj, "frame %d: the S2 block has %d bytes, not %d" % (i, len(out), size))
    return bytes(out)


def zstd_decode(obj, frames):
    """All Zstandard frames of a segment by one run of the program zstd."""
    try:
        p = subprocess.run(["zstd", "-dc"], input=b"".join(frames), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise Bad(obj, "it has Zstandard frames: install the program zstd")
    if p.returncode:
        raise Bad(obj, "zstd: %s" % p.stderr.decode(errors="replace").strip())
    return p.stdout


def segment(obj, raw, lineage, m, disk):
    """The extents of a segment: (offset, bytes or None for zeros, length). Everything in it is checked."""
    if len(raw) < 192 + 64:
        raise Bad(obj, "too short for a segment")
    foot = raw[-64:]
    magic, ver, z1, index_at, index_len, n_ext, n_frames, index_crc, stream = struct.unpack_from("<4sHHQIIIIQ", foot)
    if magic != b"LFSE" or crc32c(foot[:60]) != struct.unpack_from("<I", foot, 60)[0]:
        raise Bad(obj, "bad footer")
    if ver != 1 or z1 or any(foot[40:60]):
        raise Bad(obj, "unknown version of the footer")
    if index_at + index_len != len(raw) - 64 or index_at < 192:
        raise Bad(obj, "the index is not where the footer says")
    index = raw[index_at:index_at + index_len]
    if crc32c(index) != index_crc:
        raise Bad(obj, "bad CRC of the index")
    head = index[:192]
    if len(head) < 192 or head != raw[:192]:
        raise Bad(obj, "the header in front is not that in the index")
    if head[:4] != b"LFSG" or crc32c(head[:188]) != struct.unpack_from("<I", head, 188)[0]:
        raise Bad(obj, "bad header")
    ver, hlen, lin, size, ordinal, gen, task, kind, idlen = struct.unpack_from("<HH16sQQIIBB", head, 4)
    z2 = head[50:52] + head[116:188]
    if ver != 1 or hlen != 192 or any(z2) or any(head[52 + idlen:116]):
        raise Bad(obj, "unknown version of the header")
    is_pass = m["kind"] == "partial"
    want = (bytes.fromhex(lineage), disk["size"], disk["gen"], disk["id"],
            {"partial": 2, "rewind": 3}.get(m["kind"], 1),
            m["pass"]["ordinal"] if is_pass else m["base"] if m["kind"] == "rewind" else m["point"],
            m["pass"]["i"] if is_pass else 0)
    got = (lin, size, gen, head[52:52 + idlen].decode("ascii", "replace"), kind, ordinal, task)
    if got != want:
        raise Bad(obj, "its header says %r, the manifest %r" % (got, want))

    frames, at, p, inner = [], 192, 192, []
    if n_frames != (stream + FRAME - 1) // FRAME or not 1 <= n_ext <= 65536 or n_frames > 65536:
        raise Bad(obj, "counts of the footer do not fit")
    if len(index) < 192 + 8 * n_frames:
        raise Bad(obj, "the index is too short")
    for i in range(n_frames):
        lc, crc = struct.unpack_from("<II", index, p)
        p += 8
        n, codec = lc & 0xFFFFFF, lc >> 24
        frames.append((codec, raw[at:at + n], crc))
        at += n
    if at != index_at:
        raise Bad(obj, "the frames do not end where the index begins")
    packed = [f for c, f, _ in frames if c == 2]
    unpacked, zat = zstd_decode(obj, packed) if packed else b"", 0
    for i, (codec, f, crc) in enumerate(frames):
        want = min(FRAME, stream - i * FRAME)
        if codec == 0:
            b = f
        elif codec == 1:
            b = s2_decode(obj, i, f)
        elif codec == 2:
            b = unpacked[zat:zat + want]
            zat += want
        else:
            raise Bad(obj, "frame %d: unknown codec %d" % (i, codec))
        if len(b) != want or crc32c(b) != crc:
            raise Bad(obj, "frame %d: bad length or CRC" % i)
        inner.append(b)
    if zat != len(unpacked):
        raise Bad(obj, "its Zstandard frames are longer than they should be")
    data = memoryview(b"".join(inner))

    pos = used = 0
    for _ in range(n_ext):
        gap, p = uvarint(obj, index, p)
        n, p = uvarint(obj, index, p)
        zero, n = n & 1, (n >> 1) * SECTOR
        pos += gap * SECTOR
        if n == 0 or pos + n > size:
            raise Bad(obj, "an extent is empty or leaves the disk")
        if zero:
            yield pos, None, n
        else:
            if used + n > len(data):
                raise Bad(obj, "extents need more data than there is")
            yield pos, data[used:used + n], n
            used += n
        pos += n
    if used != len(data) or p != len(index):
        raise Bad(obj, "data or index left over")


# ---------------------------------------------------------------- disks

def vhd_footer(size):
    """docs/formats/vhd.md; the geometry is the rule of the VHD specification's appendix."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        spt, heads, cth = 255, 16, total // 255
    else:
        spt, cth = 17, total // 17
        heads = max(4, (cth + 1023) // 1024)
        if cth >= heads * 1024 or heads > 16:
            spt, heads, cth = 31, 16, total // 31
        if cth >= heads * 1024:
            spt, heads, cth = 63, 16, total // 63
    f = bytearray(512)
    struct.pack_into(">8sIIQI4sI4sQQHBBI", f, 0, b"conectix", 2, 0x10000, (1 << 64) - 1, max(0, int(time.time()) - 946684800),
                     b"win ", 0x000A0000, b"Wi2k", size, size, cth // heads, heads, spt, 2)
    f[68:84] = uuid.uuid4().bytes
    struct.pack_into(">I", f, 64, ~sum(f) & 0xFFFFFFFF)
    return bytes(f)


def round_up(n):
    return (n + MIB - 1) // MIB * MIB


def copy_snapshot(lin, c, disk, f):
    """The disk as a checkpoint's snapshot holds it."""
    snap = lin.checkpoints[c][disk["id"], disk["gen"]]
    name = "disks/%s/g%04d.vhd" % (disk["id"], disk["gen"])
    obj = "%s/%s snapshot %s" % (lin.r, name, snap["snapshot"])
    size, meta, read, ranges = lin.store.snapshot(lin.r, name, snap["snapshot"])
    full = round_up(disk["size"])
    if meta.get("seq") != str(c) or snap["size"] != disk["size"] or size != full + 512:
        raise Bad(obj, "not the snapshot that the checkpoint means: manifest %s, %d bytes" % (meta.get("seq"), size))
    foot = read(full, 512)
    if foot[:8] != b"conectix" or struct.unpack_from(">Q", foot, 48)[0] != full or \
            struct.unpack_from(">I", foot, 64)[0] != ~(sum(foot) - sum(foot[64:68])) & 0xFFFFFFFF:
        raise Bad(obj, "bad VHD footer")
    for lo, hi in ranges():
        hi = min(hi, disk["size"])
        while lo < hi:
            b = read(lo, min(4 * MIB, hi - lo))
            if not b:
                raise Bad(obj, "it ends early")
            f.seek(lo)
            f.write(b)
            lo += len(b)


def replay(lin, disk, lo, upto, f):
    """Apply what the manifests lo to upto say about a disk, in order."""
    for seq in range(lo, upto + 1):
        m = lin.manifests[seq]
        for d in m.get("disks") or []:
            if (d["id"], d["gen"]) != (disk["id"], disk["gen"]):
                continue
            if d["size"] != disk["size"]:
                raise Bad("%s/log/%012d.json" % (lin.j, seq), "the size of a generation changed")
            for s in d.get("segments") or []:
                container = {"journal": lin.j, "staging": lin.s}[s["container"]]
                obj = container + "/" + s["name"]
                raw = lin.store.get(container, s["name"])
                if len(raw) != s["bytes"] or hashlib.sha256(raw).hexdigest() != s["sha256"]:
                    raise Bad(obj, "its size or SHA-256 is not what manifest %d says: damaged" % seq)
                for off, data, n in segment(obj, raw, lin.id, m, d):
                    while data is None and n:  # zeros: write them only where something is, the file stays sparse
                        k = min(n, 4 * MIB)
                        f.seek(off)
                        if f.read(k).strip(b"\0"):
                            f.seek(off)
                            f.write(bytes(k))
                        off, n = off + k, n - k
                    if data is not None:
                        f.seek(off)
                        f.write(data)


def recover(lin, ordinal, out, raw, journal_only):
    found = [m for m in lin.manifests.values() if m["kind"] in ("base", "point") and m["point"] == ordinal]
    if lin.damage:
        print("recover.py: warning: only manifests 1 to %d can be read: %s" % (lin.head, lin.damage), file=sys.stderr)
    if not found:
        raise Bad("point %d" % ordinal, "not in the chain of lineage %s" % lin.id)
    m = found[0]
    cfg = lin.config(m)
    os.makedirs(out, exist_ok=True)
    for disk in m["disks"]:
        path = os.path.join(out, disk["id"] + (".raw" if raw else ".vhd"))
        if os.path.exists(path):
            raise Bad(path, "is there already")
        starts = lin.starts(disk["id"], disk["gen"], m["seq"], journal_only)
        if not starts:
            raise Bad("disk %s of point %d" % (disk["id"], ordinal), "neither checkpoint nor journal leads to it")
        for i, (c, lo) in enumerate(starts):
            with open(path + ".partial", "w+b") as f:
                f.truncate(disk["size"])
                try:
                    if c:
                        copy_snapshot(lin, c, disk, f)
                except Bad as e:
                    if i + 1 == len(starts):
                        raise
                    print("recover.py: warning: %s; trying further back" % e, file=sys.stderr)
                    continue
                replay(lin, disk, lo, m["seq"], f)
                if not raw:
                    f.truncate(round_up(disk["size"]))
                    f.seek(0, os.SEEK_END)
                    f.write(vhd_footer(round_up(disk["size"])))
                f.flush()
                os.fsync(f.fileno())
            break
        os.replace(path + ".partial", path)
        print("%s: %d bytes, %s, manifests %d to %d" % (path, disk["size"], "checkpoint %d" % c if c else "journal only", lo, m["seq"]))
    if cfg:
        with open(os.path.join(out, "machine.json"), "w", encoding="utf-8") as f:
            json.dump(cfg, f, indent=2)
            f.write("\n")


def survey(store, as_json):
    out, failed = [], False
    for c in store.containers("lfj-"):
        if not re.fullmatch("lfj-[0-9a-f]{32}", c):
            continue
        entry = {"lineage": c[4:], "points": []}
        out.append(entry)
        try:
            lin = Lineage(store, c[4:])
            points = lin.points()
            if lin.damage:
                entry["error"], failed = lin.damage, True
            entry["head"], entry["vm"], entry["vm_id"] = lin.head, "", ""
            if points:
                cfg = lin.config(points[-1])
                entry["vm"], entry["vm_id"] = cfg.get("display_name") or cfg.get("name", ""), cfg.get("id", "")
            for m in points:
                entry["points"].append({"point": m["point"], "seq": m["seq"], "kind": m["kind"], "cut_time": m.get("cut_time"),
                                        "consistency": m.get("consistency"), "journal_only": lin.reachable(m, True),
                                        "disks": [{"id": d["id"], "gen": d["gen"], "size": d["size"]} for d in m["disks"]]})
        except Bad as e:
            entry["error"], failed = str(e), True
    if as_json:
        json.dump(out, sys.stdout, indent=1)
        print()
    else:
        for e in out:
            print("%s  %s  %s" % (e["lineage"], e.get("vm") or "(no name)", e.get("vm_id", "")))
            for p in e["points"]:
                print("  point %-8d %s  %-5s  %s" % (p["point"], p["cut_time"], p["consistency"],
                                                     " ".join("%s=%d" % (d["id"], d["size"]) for d in p["disks"])))
            if "error" in e:
                print("  DAMAGED, what is above cannot be read: " + e["error"])
    if failed:
        raise SystemExit(1)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("store")
    a.add_argument("what", help="list, or a lineage")
    a.add_argument("point", nargs="?", help="number of the point, or newest")
    a.add_argument("outdir", nargs="?")
    a.add_argument("--json", action="store_true", help="list as JSON")
    a.add_argument("--raw", action="store_true", help="raw images instead of fixed VHD")
    a.add_argument("--journal-only", action="store_true", help="use no checkpoint: replay from the chain's beginning")
    o = a.parse_args()
    try:
        store = open_store(o.store)
        store.last = "?"
        if o.what == "list":
            return survey(store, o.json)
        if not o.outdir:
            a.error("which point, and where to?")
        lin = Lineage(store, o.what.replace("-", "").lower())
        if o.point == "newest":
            points = lin.points()
            if not points:
                raise Bad("lineage " + lin.id, "it has no point")
            o.point = points[-1]["point"]
        recover(lin, int(o.point), o.outdir, o.raw, o.journal_only)
    except (Bad, OSError) as e:
        print("recover.py: %s" % e, file=sys.stderr)
        raise SystemExit(1)
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as e:
        print("recover.py: %s: not as the documents say: %r" % (store.last, e), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

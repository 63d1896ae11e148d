package segment

import (
	"sync"

	"github.com/klauspost/compress"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Compression chooses how frames are compressed. Frames that a cheap probe finds incompressible are stored raw.
type Compression uint8

// The compressions a Writer offers.
const (
	// Fast uses s2: several hundred MB per core and second. The default.
	Fast Compression = iota
	// Small uses zstd at its fastest level: about a third of the speed, for slow links.
	Small
	// None stores every frame raw.
	None
)

// String names the compression as configurations do.
func (c Compression) String() string {
	switch c {
	case Fast:
		return "fast"
	case Small:
		return "small"
	case None:
		return "none"
	}
	return "unknown"
}

func (w *Writer) flushFrame(raw []byte) {
	crc := w.sums(raw)
	worth := w.always || probe(raw, &w.sample)
	if !worth {
		w.stats.Incompressible += int64(len(raw))
	}
	stored, codec := raw, codecRaw
	switch {
	case !worth:
	case w.o.Compression == Small:
		w.scratch = zstdEncoder().EncodeAll(raw, w.scratch[:0])
		stored, codec = w.scratch, codecZstd
	case w.o.Compression == Fast:
		if need := s2.MaxEncodedLen(len(raw)); cap(w.scratch) < need {
			w.scratch = make([]byte, need)
		}
		stored, codec = s2.Encode(w.scratch[:cap(w.scratch)], raw), codecS2
	}
	if !shrinks(len(stored), len(raw)) {
		stored, codec = raw, codecRaw
	}
	w.frames = append(w.frames, frame{off: int64(len(w.body)), stored: uint32(len(stored)), crc: crc, codec: codec})
	w.body = append(w.body, stored...)
}

// shrinks: less than 95 % is worth decoding.
func shrinks(stored, raw int) bool { return stored <= raw-raw/20 }

// Of each frame a probe looks at 4 KiB, in pieces from all over it: a frame is often made of blocks of several kinds.
const (
	probeBytes  = 4 << 10
	probePieces = 4
)

// probe tells whether a frame shrinks by 5 %, judged by a sample. Few bytes repeat within a sample of text, so it looks at
// the frequency of its bytes too: ciphertext and compressed data use all of them alike. It does not depend on the codec in
// use, so that what is said about churn can be compared over time.
func probe(raw []byte, buf *[probeBytes]byte) bool {
	sample := raw
	if len(raw) > 2*probeBytes {
		const piece = probeBytes / probePieces
		stride := (len(raw) - piece) / (probePieces - 1)
		for i := range probePieces {
			copy(buf[i*piece:(i+1)*piece], raw[i*stride:])
		}
		sample = buf[:]
	}
	if shrinks(compress.ShannonEntropyBits(sample)/8, len(sample)) {
		return true
	}
	n := s2.EstimateBlockSize(sample)
	return n >= 0 && shrinks(n, len(sample))
}

var zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2), zstd.WithEncoderCRC(false),
		zstd.WithAllLitEntropyCompression(true)) // dear on ciphertext, which the probe keeps away
	if err != nil {
		panic(err) // the options are constants
	}
	return e
})

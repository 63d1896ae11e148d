package bench

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
	// page is the unit in which non-zero data is counted, in bytes.
	page = 4 * kib
)

// vocabulary is how many words the text has.
const vocabulary = 2000

// mixture draws the content of the reference disk: of ten extents of 1 MiB four are holes, three random bytes,
// three text of words. Extent k follows from the seed and k alone.
type mixture struct {
	seed  uint64
	words [vocabulary][]byte
}

func newMixture(seed uint64) *mixture {
	m := &mixture{seed: seed}
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range m.words {
		for range 2 + r.IntN(9) {
			m.words[i] = append(m.words[i], 'a'+byte(r.IntN(26)))
		}
		m.words[i] = append(m.words[i], ' ')
	}
	return m
}

// extent fills p, which is 1 MiB, with extent k and says whether it is data: a hole leaves p alone.
func (m *mixture) extent(k int64, p []byte) bool {
	r := rand.New(rand.NewPCG(m.seed, uint64(k)+1))
	switch kind := r.IntN(10); {
	case kind < 4:
		return false
	case kind < 7:
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	default:
		for q := p; len(q) > 0; {
			u := r.Float64()
			q = q[copy(q, m.words[int(u*u*u*vocabulary)]):] // few words are common, as in language
		}
	}
	return true
}

// disk is a raw image made from a seed.
type disk struct {
	path string
	size int64
	// data is the bytes of its non-zero pages.
	data int64
}

// makeDisk writes a sparse raw image of size bytes, a multiple of 1 MiB.
func makeDisk(path string, size int64, seed uint64) (d disk, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return disk{}, fmt.Errorf("make disk: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return disk{}, fmt.Errorf("make disk: %w", err)
	}
	d = disk{path: path, size: size}
	m, p := newMixture(seed), make([]byte, mib)
	for k := int64(0); k < size/mib; k++ {
		if !m.extent(k, p) {
			continue
		}
		if _, err := f.WriteAt(p, k*mib); err != nil {
			return disk{}, fmt.Errorf("make disk: %w", err)
		}
		d.data += mib // no page of random bytes or of text is zero
	}
	if err := f.Sync(); err != nil {
		return disk{}, fmt.Errorf("make disk: %w", err)
	}
	return d, nil
}

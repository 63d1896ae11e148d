package testkit

// Fill fills p with incompressible content that depends on seed alone.
func Fill(p []byte, seed uint64) { FillAt(p, 0, seed) }

// FillAt fills p with what the endless content of seed has at byte offset off,
// so that a disk filled in pieces equals one filled at once. off is not negative.
func FillAt(p []byte, off int64, seed uint64) {
	word, skip := uint64(off)/8, int(off%8)
	var v [8]byte
	for len(p) > 0 {
		x := mix(seed + (word+1)*0x9e3779b97f4a7c15)
		if skip == 0 && len(p) >= 8 {
			_ = p[7]
			p[0], p[1], p[2], p[3] = byte(x), byte(x>>8), byte(x>>16), byte(x>>24)
			p[4], p[5], p[6], p[7] = byte(x>>32), byte(x>>40), byte(x>>48), byte(x>>56)
			p = p[8:]
		} else {
			for i := range v {
				v[i] = byte(x >> (8 * i))
			}
			p = p[copy(p, v[skip:]):]
			skip = 0
		}
		word++
	}
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

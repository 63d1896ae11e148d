package hrl

import "encoding/binary"

// Checksum is the algorithm of [MS-HRL] 2.6: the one's complement of the sum of all bytes, modulo 2^32. It finds a
// changed byte and missing data, not swapped bytes.
func Checksum(p []byte) uint32 { return ^byteSum(p) }

// checksumSkipping is Checksum over p without the four bytes at offset skip.
func checksumSkipping(p []byte, skip int) uint32 { return ^(byteSum(p[:skip]) + byteSum(p[skip+4:])) }

// byteSum adds eight bytes at a time in four lanes of 16 bits.
func byteSum(p []byte) uint32 {
	const lanes = 0x00ff00ff00ff00ff
	var sum uint32
	for len(p) >= 32 {
		// A lane gains at most 8*255 = 2,040 per round of 32 bytes; 32 rounds stay below 65,536.
		rounds := min(len(p)/32, 32)
		var acc uint64
		for range rounds {
			a, b := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
			c, d := binary.LittleEndian.Uint64(p[16:]), binary.LittleEndian.Uint64(p[24:])
			acc += a&lanes + a>>8&lanes + b&lanes + b>>8&lanes + c&lanes + c>>8&lanes + d&lanes + d>>8&lanes
			p = p[32:]
		}
		acc = acc&0x0000ffff0000ffff + acc>>16&0x0000ffff0000ffff
		sum += uint32(acc) + uint32(acc>>32)
	}
	for _, b := range p {
		sum += uint32(b)
	}
	return sum
}

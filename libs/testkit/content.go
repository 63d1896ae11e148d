package testkit

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"math/rand/v2"
)

// Text fills p with words that are drawn as languages do, some often and most rarely. It shrinks to about two thirds with s2
// and to a half with zstd, in pieces of 64 KiB. Equal seeds give equal text.
func Text(p []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 11))
	vocabulary := rand.New(rand.NewPCG(5, 5)) // one language
	words := make([][]byte, 4000)
	for i := range words {
		words[i] = make([]byte, 2+vocabulary.IntN(9))
		for j := range words[i] {
			words[i][j] = byte('a' + vocabulary.IntN(26))
		}
	}
	for at := 0; at < len(p); {
		at += copy(p[at:], words[int(float64(len(words))*rng.Float64()*rng.Float64())])
		if at < len(p) {
			p[at] = ' '
			at++
		}
	}
}

// Encrypt encrypts p in place as ransomware does: AES-256 in counter mode under a key made of seed. Encrypting again gives
// back what was there.
func Encrypt(p []byte, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // the length is right
	}
	cipher.NewCTR(block, make([]byte, aes.BlockSize)).XORKeyStream(p, p)
}

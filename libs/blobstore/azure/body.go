package azure

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/minio/crc64nvme"

	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/blobstore"
)

// summing says what checksum goes with uploads.
type summing int32

const (
	sumProbe summing = iota // CRC64, and what follows is learned from the answer
	sumCRC64
	sumMD5   // for all
	sumBasic // MD5 for block blobs; of page blobs the emulator that needs this checks none
	sumNone
)

func firstSumming(setting string) summing {
	switch setting {
	case ChecksumCRC64:
		return sumCRC64
	case ChecksumMD5:
		return sumMD5
	case ChecksumNone:
		return sumNone
	}
	return sumProbe
}

// source is the body of an upload: size bytes of r from base on, sent as often as needed.
type source struct {
	mu   sync.Mutex // over r
	r    io.ReadSeeker
	free io.ReadSeeker // where reads of r wait for a limiter, the same without: for checksums; nil where they do not
	data []byte        // all of r, when it is in memory
	base int64
	size int64
	at   int64 // r's position, relative to base; -1 is not known

	hasCRC bool
	crc    uint64
	md5    []byte
}

// newSource takes size bytes from r's present position; ErrInvalid when there are fewer.
func newSource(r io.ReadSeeker, size int64) (*source, error) {
	base, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	end, err := r.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	if size < 0 || end-base < size {
		return nil, fmt.Errorf("%w: body of %d bytes has only %d", blobstore.ErrInvalid, size, max(0, end-base))
	}
	s := &source{r: r, base: base, size: size, at: -1}
	if p, ok := r.(pacing.Body); ok {
		s.free = p.Free()
	}
	return s, nil
}

func bytesSource(data []byte) *source {
	return &source{r: bytes.NewReader(data), data: data, size: int64(len(data)), at: -1}
}

// part is a part of s as a source of its own.
func (s *source) part(off, size int64) *source {
	p := &source{r: s.section(off, size), size: size, at: -1}
	if s.free != nil {
		free := s.section(off, size)
		free.free = true
		p.free = free
	}
	return p
}

// section is a part of s that shares its reader.
func (s *source) section(off, size int64) *sectionBody {
	return &sectionBody{src: s, off: off, size: size}
}

// sum computes the checksum once and returns what the SDK sends.
func (s *source) sum(kind summing) (blob.TransferValidationType, error) {
	switch kind {
	case sumProbe, sumCRC64:
		if !s.hasCRC {
			crc, err := s.crc64()
			if err != nil {
				return nil, err
			}
			s.crc, s.hasCRC = crc, true
		}
		return blob.TransferValidationTypeCRC64(s.crc), nil
	case sumMD5, sumBasic:
		if s.md5 == nil {
			h := md5.New()
			if err := s.copyTo(h); err != nil {
				return nil, err
			}
			s.md5 = h.Sum(nil)
		}
		return blob.TransferValidationTypeMD5(s.md5), nil
	}
	return nil, nil
}

// crc64 is the service's: the polynomial 0x9A6C9329AC4BC9B5, reflected, which others call NVME's; sent little endian. The
// standard library computes it ten times slower.
func (s *source) crc64() (uint64, error) {
	if s.data != nil {
		return crc64nvme.Checksum(s.data), nil
	}
	h := crc64nvme.New()
	err := s.copyTo(h)
	return h.Sum64(), err
}

func (s *source) copyTo(w io.Writer) error {
	b := s.section(0, s.size)
	b.free = s.free != nil
	n, err := io.Copy(w, b)
	if err == nil && n != s.size {
		err = fmt.Errorf("%w: body ended after %d of %d bytes", blobstore.ErrInvalid, n, s.size)
	}
	return err
}

// sectionBody is what one try sends. An HTTP transport may go on reading a body after it has answered; once revoked, this one gives nothing
// more, so that the next try and the caller have the reader for themselves.
type sectionBody struct {
	src     *source
	off     int64 // of the section in src
	size    int64
	pos     int64
	revoked bool
	free    bool // reads without waiting for a limiter
}

var errRevoked = errors.New("body is taken back")

// Read is that of io.Reader.
func (b *sectionBody) Read(p []byte) (int, error) {
	s := b.src
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.revoked {
		return 0, errRevoked
	}
	if b.pos >= b.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), b.size-b.pos)]
	r := s.r
	if b.free {
		r, s.at = s.free, -1
	}
	if want := b.off + b.pos; s.at != want {
		if _, err := r.Seek(s.base+want, io.SeekStart); err != nil {
			return 0, err
		}
		s.at = want
	}
	n, err := r.Read(p)
	if s.at += int64(n); b.free {
		s.at = -1 // what waits must be told where it is
	}
	b.pos += int64(n)
	if errors.Is(err, io.EOF) && b.pos < b.size {
		err = fmt.Errorf("%w: body ended after %d of %d bytes", blobstore.ErrInvalid, b.pos, b.size)
	}
	return n, err
}

// Seek is that of io.Seeker.
func (b *sectionBody) Seek(offset int64, whence int) (int64, error) {
	b.src.mu.Lock()
	defer b.src.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += b.pos
	case io.SeekEnd:
		offset += b.size
	}
	if offset < 0 {
		return 0, errors.New("seek before the body")
	}
	b.pos = offset
	return offset, nil
}

// Close does nothing: whoever made the source owns its reader.
func (b *sectionBody) Close() error { return nil }

func (b *sectionBody) revoke() {
	b.src.mu.Lock()
	defer b.src.mu.Unlock()
	b.revoked = true
}

// upload sends src once, with the checksum that the service takes. A service that refuses CRC64 as a feature has done
// nothing, and is asked again without.
func (s *Store) upload(ctx context.Context, src *source, pages bool, send func(ctx context.Context, body io.ReadSeekCloser, sum blob.TransferValidationType) error) error {
	for {
		kind := summing(s.checksum.Load())
		use := kind
		if pages && kind == sumBasic {
			use = sumNone
		}
		sum, err := src.sum(use)
		if err != nil {
			return err
		}
		body := src.section(0, src.size)
		err = send(ctx, body, sum)
		body.revoke()
		if err == nil {
			s.checksum.CompareAndSwap(int32(sumProbe), int32(sumCRC64))
			return nil
		}
		if kind != sumProbe || !refusesFeature(err) {
			return err
		}
		s.checksum.CompareAndSwap(int32(sumProbe), int32(sumBasic))
		if summing(s.checksum.Load()) == sumProbe || summing(s.checksum.Load()) == sumCRC64 {
			return err
		}
	}
}

// refusesFeature tells whether the answer says that the service has not got something.
func refusesFeature(err error) bool {
	var re *azcore.ResponseError
	return errors.As(err, &re) && (re.ErrorCode == featureMissing ||
		re.StatusCode == http.StatusNotImplemented || re.ErrorCode == "UnsupportedHeader")
}

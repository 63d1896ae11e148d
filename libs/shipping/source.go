package shipping

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/rpc"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// MaxChunk is the most data that one message of a host may carry, in bytes (contract of ReadChanges).
const MaxChunk = 1 << 20

// MaxRanges is the most explicit ranges of one call of [Source.Ranges] (contract of ReadRanges).
const MaxRanges = 65536

// digestBytes is the length of one digest of HashRanges (SHA-256).
const digestBytes = 32

var (
	// ErrDamaged: a run arrived with another checksum than its host made, or changed before it was packed. The stream, or the
	// task, reads it again.
	ErrDamaged = errors.New("data differs from what its host read")
	// ErrContract: the host sent something that the contract forbids (order, bounds, length).
	ErrContract = errors.New("host broke the contract of its stream")
	// ErrStalled: the host sent nothing for too long.
	ErrStalled = errors.New("host sent nothing for too long")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Run is one run of bytes of a disk.
type Run struct {
	extent.Range
	// Data is the content, nil when the run is all zero. It is valid until the function that got it returns.
	Data []byte
	// Sum is the CRC32C that the host made of Data beside the disk, when Summed. It goes with the data into the segment.
	Sum    uint32
	Summed bool
}

// Digests is one run of SHA-256 digests of consecutive chunks.
type Digests struct {
	// Offset of the first chunk on the disk, in bytes.
	Offset int64
	// Chunks is their number.
	Chunks int64
	// Sums has 32 bytes for each chunk, nil when all chunks are zero. It is valid until the function that got
	// it returns.
	Sums []byte
}

// Source reads one disk of one host. It is safe for concurrent use when its fields are not changed.
type Source struct {
	Client changetrackerv1.ChangeTrackerServiceClient
	// VM is the machine's bare id, Lineage and Disk as the host knows them.
	VM, Lineage, Disk string
	// Size of the disk, in bytes: runs beyond it break the contract.
	Size int64
	// Resumes is how many broken streams in a row, without a byte of progress, are tried again.
	Resumes int
	// Wait is the pause before the first resume; it doubles up to MaxWait.
	Wait time.Duration
	// MaxWait bounds the pause.
	MaxWait time.Duration
	// Idle is how long the host may send nothing before the stream counts as broken; 0 never.
	Idle time.Duration
	// OnResume, when not nil, hears of each broken stream that is tried again.
	OnResume func(err error)
}

// Changes reads what changed on the disk in an open point, ascending.
func (s *Source) Changes(ctx context.Context, point uint64, take func(Run) error) error {
	all := extent.Range{Len: s.Size}
	err := s.resume(ctx, all.Off, func(ctx context.Context, beat func(recv func() error) error, next *int64) error {
		stream, err := s.Client.ReadChanges(ctx, &changetrackerv1.ReadChangesRequest{
			Vm: s.VM, Lineage: s.Lineage, Point: point, Disk: s.Disk, ResumeOffset: *next,
		})
		if err != nil {
			return err
		}
		return s.runs(stream, &changetrackerv1.ReadChangesResponse{}, beat, all, next, take)
	})
	if err != nil {
		return fmt.Errorf("read changes of disk %s in point %d: %w", s.Disk, point, err)
	}
	return nil
}

// Ranges reads live data, ascending: what the open pass holds within the window, or, for a comparing pass, the given
// ranges, which are ascending, disjoint and at most MaxRanges.
func (s *Source) Ranges(ctx context.Context, pass uint64, window extent.Range, ranges []extent.Range, take func(Run) error) error {
	if len(ranges) > 0 {
		window = extent.Span(ranges[0].Off, ranges[len(ranges)-1].End())
	}
	err := s.resume(ctx, window.Off, func(ctx context.Context, beat func(recv func() error) error, next *int64) error {
		rest := extent.Span(*next, window.End())
		req := &changetrackerv1.ReadRangesRequest{
			Vm: s.VM, Lineage: s.Lineage, Disk: s.Disk, Pass: pass,
			Window: &typesv1.ByteRange{Offset: rest.Off, Length: rest.Len},
		}
		for _, r := range ranges {
			if r = r.Intersect(rest); !r.Empty() {
				req.Ranges = append(req.Ranges, &typesv1.ByteRange{Offset: r.Off, Length: r.Len})
			}
		}
		if rest.Empty() || len(ranges) > 0 && len(req.GetRanges()) == 0 {
			return nil
		}
		stream, err := s.Client.ReadRanges(ctx, req)
		if err != nil {
			return err
		}
		return s.runs(stream, &changetrackerv1.ReadRangesResponse{}, beat, window, next, take)
	})
	if err != nil {
		return fmt.Errorf("read ranges of disk %s in pass %d: %w", s.Disk, pass, err)
	}
	return nil
}

// Hashes reads the digests of the chunks of chunkBytes within the window, ascending and without a gap.
func (s *Source) Hashes(ctx context.Context, window extent.Range, chunkBytes int64, take func(Digests) error) error {
	err := s.resume(ctx, window.Off, func(ctx context.Context, beat func(recv func() error) error, next *int64) error {
		if *next >= window.End() {
			return nil
		}
		stream, err := s.Client.HashRanges(ctx, &changetrackerv1.HashRangesRequest{
			Vm: s.VM, Lineage: s.Lineage, Disk: s.Disk, ChunkBytes: chunkBytes,
			Window: &typesv1.ByteRange{Offset: *next, Length: window.End() - *next},
		})
		if err != nil {
			return err
		}
		for {
			var m *changetrackerv1.HashRangesResponse
			err := beat(func() (err error) { m, err = stream.Recv(); return err })
			switch {
			case errors.Is(err, io.EOF) && *next < window.End():
				return fmt.Errorf("digests end at %d of %d: %w", *next, window.End(), io.ErrUnexpectedEOF)
			case errors.Is(err, io.EOF):
				return nil
			case err != nil:
				return err
			}
			left := (window.End() - *next + chunkBytes - 1) / chunkBytes
			if m.GetOffset() != *next || m.GetChunks() <= 0 || m.GetChunks() > left ||
				!m.GetZero() && int64(len(m.GetDigests())) != m.GetChunks()*digestBytes {
				return final{fmt.Errorf("digests of %d chunks at %d, expected %d: %w", m.GetChunks(), m.GetOffset(), *next, ErrContract)}
			}
			d := Digests{Offset: m.GetOffset(), Chunks: m.GetChunks()}
			if !m.GetZero() {
				d.Sums = m.GetDigests()
			}
			if err := take(d); err != nil {
				return final{err}
			}
			*next = min(*next+m.GetChunks()*chunkBytes, window.End())
		}
	})
	if err != nil {
		return fmt.Errorf("hash ranges of disk %s: %w", s.Disk, err)
	}
	return nil
}

// runMessage is what the two reading streams send, without its data.
type runMessage interface {
	proto.Message
	GetOffset() int64
	GetLength() int64
	GetZero() bool
	GetCrc32C() uint32
}

// dataField is the number of the field "data" in both messages.
const dataField = 5

// runs takes the runs of one stream until its end, moving next.
func (s *Source) runs(stream rpc.Receiver, m runMessage, beat func(recv func() error) error, within extent.Range, next *int64, take func(Run) error) error {
	var buf []byte // the run's data in one piece: blocks are tested and packed without looking at message borders
	for {
		var crc uint32
		err := beat(func() error {
			payload, err := rpc.RecvBulk(stream, m, dataField)
			if err != nil {
				return err
			}
			defer payload.Free()
			if payload.Len() > MaxChunk {
				return final{fmt.Errorf("run of %d bytes at %d: %w", payload.Len(), m.GetOffset(), ErrContract)}
			}
			buf = slices.Grow(buf[:0], payload.Len())
			for _, b := range payload {
				crc = crc32.Update(crc, castagnoli, b.ReadOnlyData())
				buf = append(buf, b.ReadOnlyData()...)
			}
			return nil
		})
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		r := extent.Range{Off: m.GetOffset(), Len: m.GetLength()}
		switch {
		case !r.Valid(), r.Empty(), r.Off < *next, !within.Contains(r), !m.GetZero() && int64(len(buf)) != r.Len, m.GetZero() && len(buf) != 0:
			return final{fmt.Errorf("run [%d,+%d) with %d bytes of data, expected within [%d,%d): %w",
				r.Off, r.Len, len(buf), *next, within.End(), ErrContract)}
		case !m.GetZero() && crc != m.GetCrc32C():
			return fmt.Errorf("run %s: %w", r, ErrDamaged)
		}
		run := Run{Range: r}
		if !m.GetZero() {
			run.Data, run.Sum, run.Summed = buf, m.GetCrc32C(), true
		}
		if err := take(run); err != nil {
			return final{err}
		}
		*next = r.End()
	}
}

// final marks an error after which the stream is not read again.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// resume calls attempt until it succeeds, fails for good, or has failed Resumes times in a row without moving next.
// beat runs one receive under the idle limit.
func (s *Source) resume(ctx context.Context, from int64, attempt func(ctx context.Context, beat func(recv func() error) error, next *int64) error) error {
	next := from
	failures := 0
	for {
		before := next
		err := s.once(ctx, &next, attempt)
		if err == nil {
			return nil
		}
		var f final
		if errors.As(err, &f) {
			return f.error
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		if next > before {
			failures = 0
		}
		failures++
		if !passing(err) || failures > s.Resumes {
			return err
		}
		if s.OnResume != nil {
			s.OnResume(err)
		}
		wait := min(s.Wait<<(failures-1), s.MaxWait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

func (s *Source) once(ctx context.Context, next *int64, attempt func(ctx context.Context, beat func(recv func() error) error, next *int64) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil) // ends the stream, whatever is left of it
	beat := func(recv func() error) error { return recv() }
	if s.Idle > 0 {
		timer := time.AfterFunc(s.Idle, func() { cancel(ErrStalled) })
		defer timer.Stop()
		beat = func(recv func() error) error {
			timer.Reset(s.Idle)
			defer timer.Stop()
			return recv()
		}
	}
	err := attempt(ctx, beat, next)
	if err != nil && errors.Is(context.Cause(ctx), ErrStalled) {
		var f final
		if !errors.As(err, &f) {
			return fmt.Errorf("%w (%s)", ErrStalled, s.Idle)
		}
	}
	return err
}

// passing reports whether a stream that ended with err may be read again.
func passing(err error) bool {
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrStalled) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true
	}
	switch errcat.Reason(errcat.FromError(err)) {
	case typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE,
		typesv1.ErrorReason_ERROR_REASON_CANCELLED, typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED:
		return true
	}
	return false
}

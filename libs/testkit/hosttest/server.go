package hosttest

import (
	"bytes"
	"crypto/sha256"
	"hash/crc32"

	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// chunk is what the two reading streams send.
type chunk struct {
	off, len int64
	zero     bool
	crc      uint32
	data     []byte
}

// ReadChanges implements ChangeTrackerService.
func (h *Host) ReadChanges(req *changetrackerv1.ReadChangesRequest, stream grpc.ServerStreamingServer[changetrackerv1.ReadChangesResponse]) error {
	h.mu.Lock()
	_, err := h.open(req.GetVm(), req.GetLineage(), req.GetDisk())
	p, cut := h.points[req.GetPoint()]
	settled := cut && p.settled
	h.mu.Unlock()
	switch {
	case err != nil:
		return err
	case !cut:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT, "point %d was not cut", req.GetPoint())
	case settled:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "point %d is settled", req.GetPoint())
	}
	image := p.images[req.GetDisk()]
	within := extent.Span(req.GetResumeOffset(), max(image.Size(), req.GetResumeOffset()))
	return h.read("ReadChanges", req.GetDisk(), image, p.changes[req.GetDisk()], within, func(c chunk) error {
		return stream.Send(&changetrackerv1.ReadChangesResponse{Offset: c.off, Length: c.len, Zero: c.zero, Crc32C: c.crc, Data: c.data})
	})
}

// ReadRanges implements ChangeTrackerService.
func (h *Host) ReadRanges(req *changetrackerv1.ReadRangesRequest, stream grpc.ServerStreamingServer[changetrackerv1.ReadRangesResponse]) error {
	h.mu.Lock()
	image, err := h.open(req.GetVm(), req.GetLineage(), req.GetDisk())
	pass := h.pass
	h.mu.Unlock()
	if err != nil {
		return err
	}
	if pass == nil || pass.ordinal != req.GetPass() {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN, "pass %d is not open", req.GetPass())
	}
	set := pass.ranges[req.GetDisk()]
	if len(req.GetRanges()) > 0 {
		set = &extent.Set{}
		for _, r := range req.GetRanges() {
			set.Add(extent.Range{Off: r.GetOffset(), Len: r.GetLength()})
		}
	}
	within := extent.Range{Len: image.Size()}
	if w := req.GetWindow(); w != nil {
		within = within.Intersect(extent.Range{Off: w.GetOffset(), Len: w.GetLength()})
	}
	return h.read("ReadRanges", req.GetDisk(), image, set, within, func(c chunk) error {
		return stream.Send(&changetrackerv1.ReadRangesResponse{Offset: c.off, Length: c.len, Zero: c.zero, Crc32C: c.crc, Data: c.data})
	})
}

// read sends what of set lies within, hole as zero messages.
func (h *Host) read(method, disk string, image *Image, set *extent.Set, within extent.Range, send func(chunk) error) error {
	if err := h.call(Message{Method: method, Disk: disk, Offset: -1}); err != nil {
		return err
	}
	for r := range set.In(within) {
		for off := r.Off; off < r.End(); {
			c := chunk{off: off}
			c.len, c.zero = image.run(extent.Span(off, r.End()))
			if !c.zero {
				c.len = min(c.len, h.ChunkBytes)
				c.data = make([]byte, c.len)
				image.ReadInto(c.data, off)
				c.crc = crc32.Checksum(c.data, castagnoli)
			}
			if err := h.call(Message{Method: method, Disk: disk, Offset: off, Data: c.data}); err != nil {
				return err
			}
			if err := send(c); err != nil {
				return err
			}
			off += c.len
		}
	}
	return nil
}

// HashRanges implements ChangeTrackerService.
func (h *Host) HashRanges(req *changetrackerv1.HashRangesRequest, stream grpc.ServerStreamingServer[changetrackerv1.HashRangesResponse]) error {
	h.mu.Lock()
	image, err := h.open(req.GetVm(), req.GetLineage(), req.GetDisk())
	h.mu.Unlock()
	if err != nil {
		return err
	}
	within := extent.Range{Len: image.Size()}
	if w := req.GetWindow(); w != nil {
		within = within.Intersect(extent.Range{Off: w.GetOffset(), Len: w.GetLength()})
	}
	const most = 1024 // chunks in one message
	size := req.GetChunkBytes()
	buf, zeros := make([]byte, size), make([]byte, size)
	out := &changetrackerv1.HashRangesResponse{Offset: within.Off}
	flush := func(next int64) error {
		if out.Chunks == 0 {
			return nil
		}
		if err := h.call(Message{Method: "HashRanges", Disk: req.GetDisk(), Offset: out.GetOffset(), Data: out.GetDigests()}); err != nil {
			return err
		}
		if err := stream.Send(out); err != nil {
			return err
		}
		out = &changetrackerv1.HashRangesResponse{Offset: next}
		return nil
	}
	if err := h.call(Message{Method: "HashRanges", Disk: req.GetDisk(), Offset: -1}); err != nil {
		return err
	}
	for off := within.Off; off < within.End(); off += size {
		n := min(size, within.End()-off)
		image.ReadInto(buf[:n], off)
		zero := bytes.Equal(buf[:n], zeros[:n])
		if out.GetChunks() == most || out.GetChunks() > 0 && out.GetZero() != zero {
			if err := flush(off); err != nil {
				return err
			}
		}
		out.Chunks++
		out.Zero = zero
		if !zero {
			sum := sha256.Sum256(buf[:n])
			out.Digests = append(out.Digests, sum[:]...)
		}
	}
	return flush(within.End())
}

// call runs the hook outside every lock.
func (h *Host) call(m Message) error {
	h.mu.Lock()
	hook := h.hook
	h.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(m)
}

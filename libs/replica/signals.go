package replica

import (
	"context"
	"fmt"
)

// Signals say what the changes of a point looked like, in bytes. Manifests carry them from version 2.
type Signals struct {
	// Changed is the distinct bytes that changed, zeros included: the unique churn.
	Changed int64 `json:"changed"`
	// Zero is those of them that are zero now.
	Zero int64 `json:"zero"`
	// Stored is the size of the segments, after compression.
	Stored int64 `json:"stored"`
	// Incompressible is those of the others in blocks of 64 KiB that, by a sample, do not shrink by 5 %.
	Incompressible int64 `json:"incompressible"`
}

// maxSignal bounds each: 64 disks of the largest size.
const maxSignal = maxDisks * maxDiskSize

// Validate checks bounds, and that the parts are not more than the whole.
func (s Signals) Validate() error {
	for _, n := range []int64{s.Changed, s.Zero, s.Stored, s.Incompressible} {
		if n < 0 || n > maxSignal {
			return fmt.Errorf("signals of %d bytes: %w", n, ErrInvalid)
		}
	}
	if s.Zero+s.Incompressible > s.Changed {
		return fmt.Errorf("signals: %d zero and %d incompressible of %d changed bytes: %w", s.Zero, s.Incompressible, s.Changed, ErrInvalid)
	}
	return nil
}

// Data is the bytes that changed to something else than zero.
func (s Signals) Data() int64 { return s.Changed - s.Zero }

// History returns the newest n recovery points at or below seq that the chain held at the last refresh, oldest first, and
// none from before the newest base at or below seq, which is the first when it is among them. Processed and Checkpointed
// are not set. It reads nothing from storage.
func (r *Replica) History(ctx context.Context, seq Seq, n int) ([]Point, error) {
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	end := r.chain.above(seq)
	begin := end
	for found := 0; begin > 0 && found < n; begin-- {
		if kind := r.chain.entries[begin-1].Kind; kind.IsPoint() {
			found++
			if kind == KindBase {
				begin--
				break
			}
		}
	}
	var out []Point
	for _, e := range r.chain.entries[begin:end] {
		if e.Kind.IsPoint() {
			out = append(out, Point{Ordinal: e.Ordinal, Seq: e.Seq, Kind: e.Kind, CutTime: e.CutTime, Consistency: e.Consistency,
				Bytes: e.Bytes, Signals: e.Signals})
		}
	}
	return out, nil
}

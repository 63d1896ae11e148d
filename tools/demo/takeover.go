package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// takeOver fails the machine over as planned, shows that nothing is missing that the guest was told is written, and
// cancels: the guest goes on writing to its source, and deltas go on.
func (r *run) takeOver(ctx context.Context) (*drilled, error) {
	out := filepath.Join(r.Dir, "taken-over")
	r.say("$ landfall failover planned %s --out %s --wait", machineName, filepath.Base(out))
	start := time.Now()
	if err := r.landfall(ctx, nil, "failover", "planned", machineName, "--out", out, "--wait"); err != nil {
		return nil, err
	}
	d := &drilled{rto: time.Since(start)}
	acked, _ := r.record.Acked()
	var err error
	if d.writes, err = r.verify(ctx, out, acked, acked+1); err != nil { // one write may be there that was not answered
		return nil, fmt.Errorf("the planned failover is WRONG: %w", err)
	}
	r.say("  the source is fenced; every byte is the machine after write %d, the last one that the guest was told of is %d", d.writes, acked)
	r.say("$ landfall failover cancel %s --wait", machineName)
	if err := r.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"); err != nil {
		return nil, err
	}
	if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the cancelled failover left %s behind", out)
	}
	err = until(ctx, func() (bool, error) {
		now, _ := r.record.Acked()
		return now > acked+1, nil
	})
	if err != nil {
		return nil, fmt.Errorf("the guest does not write again after the cancelled failover: %w", err)
	}
	r.say("  the guest writes to its source again")
	return d, nil
}

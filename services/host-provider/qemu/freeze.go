package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// thawInterval is how often an agent that does not answer is asked to thaw.
const thawInterval = 8 * time.Second

// errNotFrozen: the cut does not lie inside a confirmed freeze.
var errNotFrozen = errors.New("the guest was not frozen during the cut")

// frozen is a guest whose file systems are frozen, or may be.
type frozen struct {
	h     *held
	agent *qmp.Agent
	begun time.Time
	// timer thaws a guest whose cut takes too long; fired is closed when it has.
	timer *time.Timer
	fired chan struct{}
	// refused: the agent said no, so nothing of ours is frozen; what another program froze is not ours to thaw.
	refused bool
}

// freeze freezes the guest. The record says Freezing already. On an error the guest may be frozen all the same: thaw is to be
// called in any case. From the first byte sent the watchdog runs: it thaws after the limit whatever the cut is doing, on a
// connection of its own.
func (h *held) freeze(ctx context.Context, agent *qmp.Agent) (*frozen, error) {
	f := &frozen{h: h, agent: agent, begun: time.Now(), fired: make(chan struct{})} //nolint:forbidigo // a measurement
	limit := h.d.cfg.FreezeLimit
	socket := h.machine.AgentSocket
	f.timer = time.AfterFunc(limit, func() {
		defer close(f.fired)
		_ = agent.Close() // the socket serves one client
		ctx, cancel := context.WithTimeout(context.Background(), afterwards)
		defer cancel()
		_, err := thaw(ctx, socket)
		h.d.log.Warn("the watchdog thawed the guest: the cut took too long", "vm", h.id, "limit", limit, "error", err)
	})
	if err := h.d.effect("freeze"); err != nil {
		return f, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit*3/5) // the rest is for the cut itself
	defer cancel()
	n, err := agent.Freeze(ctx)
	if err != nil {
		f.refused = qmp.Refused(err)
		return f, fmt.Errorf("freeze: %w", err)
	}
	if n == 0 {
		return f, fmt.Errorf("freeze: %w: it has no file system that can be frozen", errNotFrozen)
	}
	return f, h.d.effect("freeze-done")
}

// thaw ends the freeze and reports whether it lasted until now. On an error the guest may still be frozen.
func (f *frozen) thaw(ctx context.Context) (lasted bool, err error) {
	if err := f.h.d.effect("thaw"); err != nil {
		f.timer.Stop()
		_ = f.agent.Close()
		return false, err
	}
	if !f.timer.Stop() {
		<-f.fired
		return false, nil
	}
	if f.refused {
		_ = f.agent.Close()
		return false, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	n, err := f.agent.Thaw(ctx)
	_ = f.agent.Close()
	if err != nil {
		n, err = thaw(ctx, f.h.machine.AgentSocket)
	}
	f.h.d.log.InfoContext(ctx, "guest thawed", "vm", f.h.id, "frozen", time.Since(f.begun), "file_systems", n) //nolint:forbidigo // a measurement
	return n > 0, err
}

// thaw thaws on a new connection, again and again until it is known or ctx ends: an agent that is still freezing answers late.
func thaw(ctx context.Context, socket string) (int, error) {
	for {
		n, err := thawOnce(ctx, socket)
		if err == nil || qmp.Refused(err) || ctx.Err() != nil {
			return n, err
		}
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return 0, err
		}
	}
}

func thawOnce(ctx context.Context, socket string) (int, error) {
	a, err := qmp.DialAgent(ctx, socket)
	if err != nil {
		return 0, err
	}
	defer func() { _ = a.Close() }()
	return a.Thaw(ctx)
}

// thawLeft thaws what a cut that was interrupted may have left frozen.
//
// An agent that does not answer is waited for seconds, so it is not asked at every call.
func (h *held) thawLeft(ctx context.Context) error {
	now := h.d.now()
	if h.machine == nil || now.Sub(h.thawTried) < thawInterval {
		return nil
	}
	h.thawTried = now
	if h.machine.AgentSocket != "" {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		if err := h.d.effect("thaw"); err != nil {
			return err
		}
		n, err := thawOnce(ctx, h.machine.AgentSocket)
		if err != nil {
			return err
		}
		h.d.log.WarnContext(ctx, "thawed the guest after an interrupted cut", "vm", h.id, "file_systems", n)
	}
	return h.update(func(r *record) { r.Freezing = false })
}

// greetAgent connects to the agent of a running guest.
func (h *held) greetAgent(ctx context.Context, m *qmp.Monitor) (*qmp.Agent, error) {
	if h.machine.AgentSocket == "" {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "machine %s has no guest agent", h.id)
	}
	var status struct {
		Running bool `json:"running"`
	}
	if err := m.Execute(ctx, "query-status", nil, &status); err != nil {
		return nil, err
	}
	if !status.Running {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "the guest of machine %s does not run", h.id)
	}
	return qmp.DialAgent(ctx, h.machine.AgentSocket)
}

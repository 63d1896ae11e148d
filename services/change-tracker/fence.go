package changetracker

import (
	"fmt"

	"github.com/landfall-dr/landfall/libs/failpoint"
)

var (
	fpBeforeFence = failpoint.Register("change-tracker/before-fence")
	fpAfterFence  = failpoint.Register("change-tracker/after-fence")
)

// fence closes a machine's exports for a failover (design.md, "Fence"). drain ends the exports' connections after their
// requests in flight.
func (m *machine) fence(lineage string, epoch uint64, failover string, drain func()) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if err := m.admit(lineage, epoch); err != nil {
		return err
	}
	r := m.rec.Load()
	if r.Fence != "" && r.Fence != failover {
		return fmt.Errorf("%w: by %s", ErrFenced, r.Fence)
	}
	if err := failpoint.Hit(fpBeforeFence); err != nil {
		return err
	}
	if r.Fence == "" {
		c := r.clone()
		c.Fence = failover
		if err := m.save(c); err != nil {
			return err
		}
		m.t.logger.Info("machine is fenced: its exports are closed", "vm", m.id, "failover", failover)
	}
	if err := failpoint.Hit(fpAfterFence); err != nil {
		return err
	}
	// From here on no export opens. What was in flight is done and answered, and what was answered is durable, before
	// the caller may believe that nothing changes any more.
	drain()
	for _, d := range m.disks {
		if err := d.Flush(); err != nil {
			return fmt.Errorf("flush image of %s: %w", d.id, err)
		}
	}
	return nil
}

// unfence lifts the fence of a failover.
func (m *machine) unfence(lineage string, epoch uint64, failover string) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	r := m.rec.Load()
	if r.Lineage != "" || m.ended { // a fence outlives its lineage
		if err := m.admit(lineage, epoch); err != nil {
			return err
		}
		r = m.rec.Load()
	}
	switch r.Fence {
	case "":
		return nil
	case failover:
	default:
		return fmt.Errorf("%w: by %s", ErrFenced, r.Fence)
	}
	c := r.clone()
	c.Fence = ""
	if err := m.save(c); err != nil {
		return err
	}
	m.t.logger.Info("machine is not fenced any more", "vm", m.id, "failover", failover)
	return nil
}

// Fence closes the exports of a machine for a failover, durably: nothing can write to its disks until Unfence. Points can
// still be cut and read. Idempotent.
func (t *Tracker) Fence(id, lineage string, epoch uint64, failover string, drain func()) error {
	m, err := t.machine(id)
	if err != nil {
		return err
	}
	return m.fence(lineage, epoch, failover, drain)
}

// Unfence lifts the fence of a failover. Idempotent; refused for the fence of another.
func (t *Tracker) Unfence(id, lineage string, epoch uint64, failover string) error {
	m, err := t.machine(id)
	if err != nil {
		return err
	}
	return m.unfence(lineage, epoch, failover)
}

// export finds a disk for a guest, by its name "<machine>/<disk>".
func (t *Tracker) export(name string) (*disk, error) {
	d, err := t.disk(name)
	if err != nil {
		return nil, err
	}
	if by := d.m.rec.Load().Fence; by != "" {
		return nil, fmt.Errorf("%w: machine %s by %s", ErrFenced, d.m.id, by)
	}
	return d, nil
}

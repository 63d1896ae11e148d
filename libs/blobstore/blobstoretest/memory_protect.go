package blobstoretest

import (
	"context"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

var _ blobstore.Protector = (*Memory)(nil)

// ContainerProtection reads the policy that ProtectContainer set.
func (m *Memory) ContainerProtection(ctx context.Context, container string) (blobstore.Protection, error) {
	if err := ctx.Err(); err != nil {
		return blobstore.Protection{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.containers.Get(container)
	if !ok {
		return blobstore.Protection{}, fmt.Errorf("protection of %s: %w", container, blobstore.ErrNoContainer)
	}
	return c.protection, nil
}

// ProtectContainer makes the container write-once, or its policy stronger: as in Azure a blob under a policy is never
// overwritten, and deleted only WriteOnce after its creation by the store's clock.
func (m *Memory) ProtectContainer(ctx context.Context, container string, p blobstore.Protection) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.containers.Get(container)
	if !ok {
		return fmt.Errorf("protect %s: %w", container, blobstore.ErrNoContainer)
	}
	c.protection.WriteOnce = max(c.protection.WriteOnce, p.WriteOnce)
	c.protection.Locked = c.protection.Locked || p.Locked
	c.protection.LegalHold = c.protection.LegalHold || p.LegalHold
	return nil
}

// LiftLegalHold ends the container's legal hold; the time-based policy stays.
func (m *Memory) LiftLegalHold(container string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c, ok := m.containers.Get(container); ok {
		c.protection.LegalHold = false
	}
}

// overwritable refuses to change a blob under a policy. Caller holds mu.
func (c *memContainer) overwritable() error {
	if c.protection.WriteOnce > 0 || c.protection.LegalHold {
		return blobstore.ErrWriteOnce
	}
	return nil
}

// deletable refuses to delete a blob that the policy still keeps. Caller holds mu.
func (c *memContainer) deletable(b *memBlob, now time.Time) error {
	if c.protection.LegalHold || c.protection.WriteOnce > 0 && now.Before(b.created.Add(c.protection.WriteOnce)) {
		return blobstore.ErrWriteOnce
	}
	return nil
}

package dir

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// Every blob name owns four bytes of the lock file, at an offset made from the name's hash (two names
// that collide only wait for each other). Exclusive holders take them in this order:
//
//	lockGate   turnstile before lockData: whoever wants lockData exclusively holds it while it waits, so
//	           that an endless stream of page writes cannot starve it
//	lockData   shared: page writes. Exclusive: sequence number, snapshot (for the whole copy), delete, put
//	lockGate2  turnstile before lockState
//	lockState  shared: page writes. Exclusive: whoever changes what conditions look at, leases included
//
// A lease call takes only lockGate2 and lockState, so a lease is renewed while a snapshot is copied.
// A page write takes all four at once or none, without waiting, then gives the turnstiles back: three
// system calls, because the bytes are neighbours.
const (
	lockGate = iota
	lockGate2
	lockData
	lockState
	lockBytes
)

// sessionSpace is where the offsets of session locks begin, above all blob locks.
const sessionSpace = int64(1) << 61

// blobOffset is the offset of a blob's first lock byte.
func blobOffset(container, name string) int64 {
	h := sha256.Sum256([]byte(container + "/" + name))
	return int64(binary.LittleEndian.Uint64(h[:])>>4) &^ (2*lockBytes - 1) // below 1<<60
}

// sessionOffset is the lock byte of a session.
func sessionOffset(id uint64) int64 { return sessionSpace + int64(id>>4) }

// guard is a set of locks on one blob, held on a file description of its own.
type guard struct {
	s    *Store
	f    *os.File
	base int64
	held [lockBytes]bool
}

func (s *Store) openLockFile() (*os.File, error) {
	return os.OpenFile(filepath.Join(s.root, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
}

// newGuard returns a guard that holds nothing.
func (s *Store) newGuard(container, name string) (*guard, error) {
	g := &guard{s: s, base: blobOffset(container, name)}
	select {
	case g.f = <-s.locks:
		return g, nil
	default:
	}
	f, err := s.openLockFile()
	g.f = f
	return g, err
}

// release drops all locks.
func (g *guard) release() {
	if g.f == nil {
		return
	}
	if unlockHeld(g.f, g.base, &g.held) == nil && !g.s.closed.Load() {
		select {
		case g.s.locks <- g.f:
			g.f = nil
			return
		default:
		}
	}
	_ = g.f.Close() // drops whatever is still held
	g.f = nil
}

func (g *guard) drop(i int) error {
	g.held[i] = false
	return unlock(g.f, g.base+int64(i), 1)
}

func (g *guard) try(i int, exclusive bool) (bool, error) {
	ok, err := tryLock(g.f, g.base+int64(i), 1, exclusive)
	g.held[i] = ok && err == nil
	return g.held[i], err
}

// wait takes lock i exclusively, polling: the kernel's own wait cannot be cancelled.
func (g *guard) wait(ctx context.Context, i int) error {
	for attempt := 0; ; attempt++ {
		if ok, err := g.try(i, true); ok || err != nil {
			return err
		}
		if err := pause(ctx, attempt); err != nil {
			return err
		}
	}
}

// pause waits a little before the next attempt: first only yielding, then 20 µs growing to 2 ms.
func pause(ctx context.Context, attempt int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if attempt < 8 {
		runtime.Gosched()
		return nil
	}
	t := time.NewTimer(min(2*time.Millisecond, 20*time.Microsecond<<min(attempt-8, 10)))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// lockShared is what a page write holds.
func (s *Store) lockShared(ctx context.Context, container, name string) (*guard, error) {
	g, err := s.newGuard(container, name)
	if err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		ok, err := tryLock(g.f, g.base, lockBytes, false)
		if ok && err == nil {
			g.held = [lockBytes]bool{lockData: true, lockState: true}
			if err = unlock(g.f, g.base+lockGate, 2); err == nil {
				return g, nil
			}
		}
		if err == nil {
			err = pause(ctx, attempt)
		}
		if err != nil {
			g.release()
			return nil, err
		}
	}
}

// lockExclusive holds data and state: nobody else reads conditions or writes.
func (s *Store) lockExclusive(ctx context.Context, container, name string) (*guard, error) {
	return s.lockAll(ctx, container, name, lockGate, lockData, lockGate2, lockState)
}

// lockLease holds the state only.
func (s *Store) lockLease(ctx context.Context, container, name string) (*guard, error) {
	return s.lockAll(ctx, container, name, lockGate2, lockState)
}

// lockAll takes pairs of turnstile and lock, leaving each turnstile once its lock is held.
func (s *Store) lockAll(ctx context.Context, container, name string, locks ...int) (*guard, error) {
	g, err := s.newGuard(container, name)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(locks) && err == nil; i += 2 {
		if err = g.wait(ctx, locks[i]); err == nil {
			if err = g.wait(ctx, locks[i+1]); err == nil {
				err = g.drop(locks[i])
			}
		}
	}
	if err != nil {
		g.release()
		return nil, err
	}
	return g, nil
}

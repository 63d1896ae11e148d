package inside

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/filering"
	"github.com/landfall-dr/landfall/tools/guest/ledger"
)

// filesEvery: each so many steps also do a file operation on both disks.
const filesEvery = 4

// consoleAcksEach is how often the newest step is acknowledged on the console, when there is no port.
const consoleAcksEach = time.Second

// Names within a disk's folder.
const (
	ledgerName = "ledger"
	filesName  = "files"
	loadName   = "load"
)

// Files that steer the writer. A step holds stepLock; whoever wants the disks at rest takes
// gateLock, so that no new step begins, and then waits for stepLock.
const (
	gateLock = runFolder + "/gate"
	stepLock = runFolder + "/step"
	ratePath = runFolder + "/rate"
)

// osRing and dataRing are the file histories of a ledger.
func osRing(id ledger.ID) filering.Ring   { return filering.Ring{Seed: id.Seed(), Disk: 1} }
func dataRing(id ledger.ID) filering.Ring { return filering.Ring{Seed: id.Seed(), Disk: 2} }

// Write runs the writer until the context ends. It makes the ledger when there
// is none, and finishes the step that a crash interrupted before a new one.
func Write(ctx context.Context, rate int) error {
	id, err := makeLedgers()
	if err != nil {
		return err
	}
	w := &writer{id: id}
	if w.buf, err = unix.Mmap(-1, 0, ledger.RecordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return fmt.Errorf("buffer: %w", err)
	}
	if w.intent, err = openDirect(filepath.Join(osFolder, ledgerName)); err != nil {
		return err
	}
	defer w.intent.Close()
	if w.commit, err = openDirect(filepath.Join(dataFolder, ledgerName)); err != nil {
		return err
	}
	defer w.commit.Close()
	for _, d := range []string{osFolder, dataFolder} {
		if err := filering.RemoveTemporary(filepath.Join(d, filesName)); err != nil {
			return err
		}
	}
	i, err := ledger.Read(w.intent, ledger.Intent)
	if err != nil {
		return err
	}
	c, err := ledger.Read(w.commit, ledger.Commit)
	if err != nil {
		return err
	}
	if bad := append(append(i.Bad, c.Bad...), ledger.Compare(i, c)...); len(bad) > 0 {
		return fmt.Errorf("the ledger is not consistent: %v", bad)
	}
	w.out, w.hasPort = openPort()
	return w.run(ctx, c.Top+1, rate)
}

type writer struct {
	id             ledger.ID
	intent, commit *os.File
	buf            []byte // page aligned, for direct writes
	out            port
	hasPort        bool
	lastOnConsole  time.Time
}

func (w *writer) run(ctx context.Context, n uint64, rate int) error {
	gate, err := openLock(gateLock)
	if err != nil {
		return err
	}
	defer gate.Close()
	step, err := openLock(stepLock)
	if err != nil {
		return err
	}
	defer step.Close()
	pace := time.NewTimer(0)
	defer pace.Stop()
	for ; ctx.Err() == nil; n++ {
		if err := waitTurn(ctx, pace, rate); err != nil {
			return nil //nolint:nilerr // the end was asked for
		}
		if err := lock(gate, unix.LOCK_SH); err != nil {
			return err
		}
		if err := lock(gate, unix.LOCK_UN); err != nil {
			return err
		}
		if err := lock(step, unix.LOCK_EX); err != nil {
			return err
		}
		if err := w.step(n); err != nil {
			return err
		}
		if err := lock(step, unix.LOCK_UN); err != nil {
			return err
		}
	}
	return nil
}

// rateLook is how often a writer that pauses looks whether it may go on.
const rateLook = 50 * time.Millisecond

// waitTurn keeps the rate: the one in ratePath, which `landfall-guest rate` sets while the writer runs, or else the given one.
func waitTurn(ctx context.Context, pace *time.Timer, rate int) error {
	for {
		now := rate
		if b, err := os.ReadFile(ratePath); err == nil {
			if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				now = n
			}
		}
		wait := rateLook
		switch {
		case now == 0:
			return ctx.Err()
		case now > 0:
			wait = time.Second / time.Duration(now)
		}
		// The timer runs since the last step began: a step that takes its time does not slow the rate down.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-pace.C:
		}
		pace.Reset(wait)
		if now > 0 {
			return nil
		}
	}
}

// SetRate changes the rate of the running writer; negative pauses it.
func SetRate(rate int) error {
	tmp := ratePath + ".new"
	if err := os.WriteFile(tmp, []byte(strconv.Itoa(rate)), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, ratePath)
}

// step does step n: intent, files, commit, each durable before the next; then the acknowledgement.
func (w *writer) step(n uint64) error {
	if err := ledger.Put(w.intent, w.buf, ledger.Intent, w.id, n); err != nil {
		return err
	}
	if n%filesEvery == 0 {
		if err := osRing(w.id).Apply(filepath.Join(osFolder, filesName), n/filesEvery); err != nil {
			return err
		}
		if err := dataRing(w.id).Apply(filepath.Join(dataFolder, filesName), n/filesEvery); err != nil {
			return err
		}
	}
	if err := ledger.Put(w.commit, w.buf, ledger.Commit, w.id, n); err != nil {
		return err
	}
	w.ack(n)
	return nil
}

func (w *writer) ack(n uint64) {
	if w.hasPort {
		w.out.line("ACK " + strconv.FormatUint(n, 10))
		return
	}
	if now := time.Now(); now.Sub(w.lastOnConsole) >= consoleAcksEach {
		w.lastOnConsole = now
		say(guest.AckPrefix + strconv.FormatUint(n, 10))
	}
}

// makeLedgers makes the sides that are missing and returns the ledger's id.
// The OS disk's comes first, so that a data disk never has one that the OS disk does not know.
func makeLedgers() (ledger.ID, error) {
	for _, d := range []string{osFolder, dataFolder} {
		for _, sub := range []string{filesName, loadName} {
			if err := os.MkdirAll(filepath.Join(d, sub), 0o755); err != nil {
				return ledger.ID{}, err
			}
		}
	}
	id, err := ledgerID(osFolder, ledger.Intent)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := rand.Read(id[:]); err != nil {
			return id, err
		}
		err = makeLedger(osFolder, ledger.Intent, id)
	}
	if err != nil {
		return id, err
	}
	if _, err = ledgerID(dataFolder, ledger.Commit); errors.Is(err, fs.ErrNotExist) {
		err = makeLedger(dataFolder, ledger.Commit, id)
	}
	return id, err
}

func ledgerID(dir string, side ledger.Side) (ledger.ID, error) {
	f, err := os.Open(filepath.Join(dir, ledgerName))
	if err != nil {
		return ledger.ID{}, err
	}
	defer f.Close()
	s, err := ledger.Read(f, side)
	return s.ID, err
}

// makeLedger preallocates a side with real content: an unwritten extent would need the journal at each first write.
func makeLedger(dir string, side ledger.Side, id ledger.ID) error {
	tmp := filepath.Join(dir, ledgerName+".new")
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := ledger.Format(f, make([]byte, ledger.RecordSize), side, id); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(dir, ledgerName)); err != nil {
		return err
	}
	unix.Sync() // the folders above are new as well
	return nil
}

// openDirect opens a file whose every write is on the disk, past its cache, before it returns.
func openDirect(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
}

func openLock(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
}

func lock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// atRest runs f while the writer is between two steps.
func atRest(f func() error) error {
	gate, err := openLock(gateLock)
	if err != nil {
		return err
	}
	defer gate.Close()
	step, err := openLock(stepLock)
	if err != nil {
		return err
	}
	defer step.Close()
	if err := lock(gate, unix.LOCK_EX); err != nil {
		return err
	}
	if err := lock(step, unix.LOCK_EX); err != nil {
		return err
	}
	return f()
}

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/nbdclient"
	"github.com/landfall-dr/landfall/tools/workload"
)

// readerAt reads one disk of a point.
type readerAt struct {
	ctx context.Context //nolint:containedctx // io.ReaderAt has none
	s   *replica.Source
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) { return len(p), r.s.ReadAt(r.ctx, p, off) }

// machine is the guest, what it remembers, and every point that was ever seen received.
type machine struct {
	p       *product
	guest   workload.Guest
	initial func(int, []byte, int64)
	record  *workload.Record
	stop    context.CancelFunc
	written chan error

	store    blobstore.Store
	chain    *replica.Replica
	seen     []replica.Point // in the order of the chain
	verified map[replica.Ordinal]uint64
	based    int // verified points that were read from a checkpoint
}

// newMachine makes the machine's folder; call it before the product starts.
func newMachine(p *product, seed uint64, osSize, dataSize int64) *machine {
	m := &machine{p: p, guest: guestOf(seed, osSize, dataSize), initial: initialOf(seed), record: &workload.Record{}, verified: map[replica.Ordinal]uint64{}}
	require.NoError(p.t, makeMachine(p.images, m.guest, m.initial))
	return m
}

// write starts the guest; it writes until the test ends, and stops the test's clean-up with an error it saw.
func (m *machine) write(pause time.Duration) {
	uris := m.p.uris()
	ctx, cancel := context.WithCancel(context.Background())
	written := make(chan error, 1)
	m.stop, m.written = cancel, written
	m.p.t.Cleanup(m.rest)
	go func() {
		written <- m.guest.Run(ctx, m.record, func(ctx context.Context, d int) (workload.Target, error) {
			return nbdclient.Dial(ctx, uris[d])
		}, workload.Options{Pause: pause, FlushEvery: 40})
	}()
}

// rest stops the guest, which must never have seen an error.
func (m *machine) rest() {
	if m.stop == nil {
		return
	}
	m.stop()
	m.stop = nil
	if err := <-m.written; err != nil {
		m.p.t.Errorf("the guest saw an error: %v", err)
	}
}

// healthy says that the guest still writes.
func (m *machine) healthy() error {
	select {
	case err := <-m.written:
		m.written <- err
		return errors.Join(errors.New("the guest stopped"), err)
	default:
		return nil
	}
}

// open finds the machine's only lineage in the store.
func (m *machine) open(ctx context.Context) error {
	store, err := m.p.openStore(ctx)
	if err != nil {
		return err
	}
	if m.store == nil {
		m.p.t.Cleanup(func() { _ = m.store.Close() })
	} else {
		_ = m.store.Close()
	}
	m.store = store
	vm, err := m.p.vm(ctx)
	if err != nil {
		return err
	}
	m.chain, err = replica.Open(ctx, store, replica.Lineage(vm.Lineage))
	return err
}

// look reads the points from storage: none that was ever seen may be missing, and ordinals grow.
func (m *machine) look(ctx context.Context) ([]replica.Point, error) {
	chain, err := replica.Open(ctx, m.store, m.chain.Lineage()) // from the beginning: as somebody who lost everything else would
	if err != nil {
		return nil, err
	}
	m.chain = chain
	points, err := chain.Points(ctx)
	if err != nil {
		return nil, err
	}
	if len(points) < len(m.seen) {
		return nil, fmt.Errorf("%d points, there were %d", len(points), len(m.seen))
	}
	for i, q := range points {
		if i > 0 && q.Ordinal <= points[i-1].Ordinal {
			return nil, fmt.Errorf("point %d follows point %d", q.Ordinal, points[i-1].Ordinal)
		}
		if i < len(m.seen) && (q.Ordinal != m.seen[i].Ordinal || q.Seq != m.seen[i].Seq || !q.CutTime.Equal(m.seen[i].CutTime)) {
			return nil, fmt.Errorf("point %d (manifest %d) was received, now point %d (manifest %d) stands there", m.seen[i].Ordinal, m.seen[i].Seq, q.Ordinal, q.Seq)
		}
	}
	m.seen = points
	return points, nil
}

// bounds says which writes a point may have as its newest: its cut began after its cut time and ended before the next's.
func (m *machine) bounds(points []replica.Point, i int) (low, high uint64) {
	end := time.Now()
	for _, q := range points[i+1:] {
		if q.CutTime.Before(end) && q.CutTime.After(points[i].CutTime) {
			end = q.CutTime
		}
	}
	return m.record.Bounds(points[i].CutTime, end)
}

// verify reads one point from the store as a failover does, and holds it against the record.
func (m *machine) verify(ctx context.Context, points []replica.Point, i int) error {
	q := points[i]
	var copies []io.ReaderAt
	for _, d := range m.guest.Disks {
		s, err := m.chain.SourceAt(ctx, q.Seq, d.ID)
		if err != nil {
			return fmt.Errorf("read point %d: %w", q.Ordinal, err)
		}
		if s.Checkpoint() > 0 && d.ID == "os" {
			m.based++
		}
		copies = append(copies, readerAt{ctx, s})
	}
	low, high := m.bounds(points, i)
	n, err := m.guest.Verify(ctx, copies, m.initial, low, high)
	if err != nil {
		return fmt.Errorf("point %d (manifest %d, cut %s, writes %d to %d) is WRONG: %w", q.Ordinal, q.Seq, q.CutTime.Format(time.RFC3339Nano), low, high, err)
	}
	m.verified[q.Ordinal] = n
	return nil
}

// mostOnAzurite is how many points are verified at a time on the emulator, which reads slowly.
const mostOnAzurite = 6

// verifyNew verifies the points that were not verified yet, the newest first, at most limit of them (0: all, on the emulator
// mostOnAzurite).
func (m *machine) verifyNew(ctx context.Context, limit int) error {
	if m.p.storage.Kind() == backend.KindAzure && (limit == 0 || limit > mostOnAzurite) {
		limit = mostOnAzurite
	}
	points, err := m.look(ctx)
	if err != nil {
		return err
	}
	for i := len(points) - 1; i >= 0; i-- {
		if _, done := m.verified[points[i].Ordinal]; done {
			continue
		}
		if err := m.verify(ctx, points, i); err != nil {
			return err
		}
		if limit--; limit == 0 {
			return nil
		}
	}
	return nil
}

// failover takes a test failover of a point by the command line, verifies the copy and cleans up.
func (m *machine) failover(ctx context.Context, ordinal replica.Ordinal) {
	t := m.p.t
	t.Helper()
	out := filepath.Join(m.p.dir, "drill-"+strconv.FormatUint(uint64(ordinal), 10))
	require.NoError(t, m.p.landfall(ctx, nil, "failover", "test", machineName, "--point", strconv.FormatUint(uint64(ordinal), 10), "--out", out, "--wait"))
	m.verifyCopy(ctx, out, ordinal)
	require.NoError(t, m.p.landfall(ctx, nil, "failover", "cleanup", machineName, "--wait"))
	require.NoDirExists(t, out, "clean-up removes what the failover made")
}

// verifyCopy holds the VHD files of a failover against the record.
func (m *machine) verifyCopy(ctx context.Context, out string, ordinal replica.Ordinal) {
	t := m.p.t
	t.Helper()
	points, err := m.look(ctx)
	require.NoError(t, err)
	for i, q := range points {
		if q.Ordinal != ordinal {
			continue
		}
		var copies []io.ReaderAt
		for _, disk := range m.guest.Disks {
			image, err := vdisk.Open(filepath.Join(out, disk.ID+".vhd"), vdisk.FormatVHD, true)
			require.NoError(t, err)
			defer image.Close()
			require.Equal(t, disk.Size, image.Size())
			copies = append(copies, image)
		}
		low, high := m.bounds(points, i)
		_, err = m.guest.Verify(ctx, copies, m.initial, low, high)
		require.NoError(t, err, "test failover of point %d", ordinal)
		return
	}
	t.Fatalf("point %d is not in the chain", ordinal)
}

// since waits until n points that were cut after a moment are received, and returns all points.
func (m *machine) since(at time.Time, n int, timeout time.Duration) []replica.Point {
	m.p.t.Helper()
	var points []replica.Point
	m.p.wait(timeout, fmt.Sprintf("%d points since %s", n, at.Format(time.RFC3339Nano)), func(ctx context.Context) error {
		if m.chain == nil {
			if err := m.open(ctx); err != nil {
				return err
			}
		}
		var err error
		if points, err = m.look(ctx); err != nil {
			return err
		}
		have := 0
		for _, q := range points {
			if q.CutTime.After(at) {
				have++
			}
		}
		if have < n {
			return fmt.Errorf("%d of %d points", have, n)
		}
		return m.quiet()
	})
	return points
}

func (m *machine) quiet() error {
	if m.written == nil {
		return nil
	}
	return m.healthy()
}

// only fails unless replication got by with these numbers of full and comparing passes.
func (m *machine) only(ctx context.Context, full, comparing int64) error {
	vm, err := m.p.vm(ctx)
	if err != nil {
		return err
	}
	if c := vm.GetCounters(); c.GetFullPasses() != full || c.GetComparePasses() != comparing {
		return fmt.Errorf("%d full and %d comparing passes were run, want %d and %d", c.GetFullPasses(), c.GetComparePasses(), full, comparing)
	}
	return nil
}

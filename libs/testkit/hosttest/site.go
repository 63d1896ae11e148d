package hosttest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// Names of the one machine of a Site.
const (
	SiteID   = "lab"
	HostID   = "host-1"
	VMID     = "vm-1"
	VMName   = "sites/lab/vms/vm-1"
	HostName = "sites/lab/hosts/host-1"
	Lineage  = "0123456789abcdef0123456789abcdef"
)

// Site is what workers that pull data live in: a real bus, a real gRPC server in front of one Host, a store. All of
// it ends with the test.
type Site struct {
	Host  *Host
	Store blobstore.Store
	// Bus is the test's own connection, as a scheduler.
	Bus *bus.Bus

	t      testing.TB
	server *bus.Server
	net    rpc.Network

	mu       sync.Mutex
	events   []*bus.Received
	stopHost func()
	tasks    int
}

// NewSite starts a site over a store and makes the lineage there. The host has no disks yet.
func NewSite(t testing.TB, store blobstore.Store) *Site {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s := &Site{t: t, Store: store, Host: NewHost(VMID, Lineage)}
	var err error
	s.server, err = bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: t.TempDir(), Unsynced: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.server.Stop(context.Background())) })
	s.Bus = s.Connect("scheduler")
	require.NoError(t, s.Bus.Declare(ctx, bus.Declaration{}))
	_, err = replica.Create(ctx, store, Lineage)
	require.NoError(t, err)
	s.watch()
	s.StartHost()
	t.Cleanup(s.StopHost)
	return s
}

// Connect opens a connection to the bus for a service.
func (s *Site) Connect(name string) *bus.Bus {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b, err := bus.Connect(ctx, bus.Options{Server: s.server, Name: name, Logger: testkit.Logger(s.t)})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, b.Close(context.Background())) })
	return b
}

// StartHost serves the host.
func (s *Site) StartHost() {
	s.t.Helper()
	srv, err := rpc.NewServer(rpc.ServerOptions{
		Name: "change-tracker", Identity: rpc.Identity{Peer: pki.ServiceIdentity("change-tracker").On(HostID)},
		StopTimeout: 10 * time.Millisecond, // a host that goes away does not wait
	})
	require.NoError(s.t, err)
	changetrackerv1.RegisterChangeTrackerServiceServer(srv, s.Host)
	ctx, cancel := context.WithCancel(context.Background())
	lis, err := s.net.Listen(ctx, "mem:"+HostID)
	require.NoError(s.t, err)
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, lis) }()
	s.stopHost = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Logf("host went away: %v", err) // handlers that a hook holds may outlive their streams
		}
	})
}

// StopHost takes the host away, cutting its streams off.
func (s *Site) StopHost() { s.stopHost() }

// Hosts is the way to the host for a service.
func (s *Site) Hosts(service string) *rpc.Hosts {
	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: pki.ServiceIdentity(service)}, Network: &s.net})
	s.t.Cleanup(func() { require.NoError(s.t, dialer.Close()) })
	return rpc.NewHosts(dialer, func(_ context.Context, host, service string) (string, error) {
		if host != HostID || service != "change-tracker" {
			return "", fmt.Errorf("%s on %s: %w", service, host, rpc.ErrUnknownHost)
		}
		return "mem:" + HostID, nil
	}, time.Now)
}

// watch collects events until the test ends.
func (s *Site) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	watcher := s.Connect("watcher")
	go func() {
		done <- watcher.Subscribe(ctx, bus.Subscription{Start: bus.FromFirst}, func(_ context.Context, e *bus.Received) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.events = append(s.events, e)
			return nil
		})
	}()
	s.t.Cleanup(func() {
		cancel()
		require.NoError(s.t, <-done)
	})
}

// Events returns the events of a type that were published so far, decoded by make; "" is all types.
func Events[M proto.Message](s *Site, typ string, empty func() M) []M {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []M
	for _, e := range s.events {
		if e.Type == typ {
			m := empty()
			require.NoError(s.t, e.Decode(m))
			out = append(out, m)
		}
	}
	return out
}

// Await waits until an event of a type satisfies want, and returns the first that does.
func Await[M proto.Message](s *Site, typ string, empty func() M, want func(M) bool) M {
	s.t.Helper()
	var found M
	testkit.Eventually(s.t, 30*time.Second, func() error {
		for _, m := range Events(s, typ, empty) {
			if want(m) {
				found = m
				return nil
			}
		}
		return fmt.Errorf("no such %s among %q", typ, s.types())
	})
	return found
}

// Barrier returns when every event that was published before it has been seen: only then does the absence of an event
// say anything.
func (s *Site) Barrier() {
	s.t.Helper()
	s.mu.Lock()
	s.tasks++
	mark := fmt.Sprint("barrier-", s.tasks)
	s.mu.Unlock()
	require.NoError(s.t, s.Bus.PublishEvent(testkit.Context(s.t), bus.Event{
		Type: "test-barrier.reached", Site: SiteID, ID: mark, Payload: &typesv1.ErrorDetail{What: mark},
	}))
	Await(s, "test-barrier.reached", func() *typesv1.ErrorDetail { return &typesv1.ErrorDetail{} },
		func(d *typesv1.ErrorDetail) bool { return d.GetWhat() == mark })
}

func (s *Site) types() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		out = append(out, e.Type+" "+string(e.JSON()))
	}
	return out
}

// Publish puts a task into a queue under a new id.
func (s *Site) Publish(kind bus.Kind, task proto.Message) {
	s.t.Helper()
	s.mu.Lock()
	s.tasks++
	id := fmt.Sprintf("task-%d", s.tasks)
	s.mu.Unlock()
	require.NoError(s.t, s.Bus.PublishTask(testkit.Context(s.t), kind, SiteID, id, task))
}

// PointTask is the ship task of a cut point.
func (s *Site) PointTask(ordinal, base, epoch uint64, kind typesv1.PointKind) *uploaderv1.ShipTask {
	return &uploaderv1.ShipTask{
		Vm: VMName, Host: HostName, Lineage: Lineage, Epoch: epoch, Base: base, Disks: s.Host.Disks(),
		Work: &uploaderv1.ShipTask_Point{Point: &uploaderv1.PointTask{
			Ordinal: ordinal, Kind: kind, Consistency: typesv1.Consistency_CONSISTENCY_CRASH,
			CutTime: timestamppb.New(time.Date(2026, 11, 22, 10, 0, int(ordinal), 0, time.UTC)),
		}},
		Machine: &typesv1.Machine{Name: VMName, Id: VMID, DisplayName: "vm", Generation: 2, Cpus: 1, MemoryBytes: 1 << 30, Disks: s.Host.Disks(), Host: HostName},
		Reason:  "test",
	}
}

// PassTasks are the ship tasks of a pass: one for each window of each disk, or one empty task for a machine without
// space.
func (s *Site) PassTasks(ordinal, base, epoch uint64, scope typesv1.PassScope, window int64) []*uploaderv1.ShipTask {
	var out []*uploaderv1.ShipTask
	for _, d := range s.Host.Disks() {
		for off := int64(0); off < d.GetSizeBytes(); off += window {
			out = append(out, &uploaderv1.ShipTask{
				Vm: VMName, Host: HostName, Lineage: Lineage, Epoch: epoch, Base: base, Disks: s.Host.Disks(), Reason: "test",
				Work: &uploaderv1.ShipTask_Pass{Pass: &uploaderv1.PassTask{
					Ordinal: ordinal, Scope: scope, Disk: d.GetId(),
					Window: &typesv1.ByteRange{Offset: off, Length: min(window, d.GetSizeBytes()-off)},
				}},
			})
		}
	}
	for i, t := range out {
		t.GetPass().Index, t.GetPass().Tasks = int32(i+1), int32(len(out))
	}
	return out
}

// Commit puts a cut point into the chain as an uploader would, without one. The point's changes fit one segment per disk.
func (s *Site) Commit(ordinal, base, epoch uint64, kind replica.Kind) (replica.Result, error) {
	s.t.Helper()
	ctx, r := testkit.Context(s.t), s.Replica()
	p := replica.Proposal{
		Kind: kind, Epoch: replica.Epoch(epoch), Point: replica.Ordinal(ordinal), Base: replica.Ordinal(base),
		CutTime: time.Date(2026, 11, 22, 10, 0, int(ordinal), 0, time.UTC), Consistency: replica.ConsistencyCrash, Host: HostName,
	}
	tx := replica.NewTx()
	for _, d := range s.Host.Disks() {
		disk := replica.Disk{ID: d.GetId(), Gen: 1, Size: d.GetSizeBytes()}
		w, err := segment.NewWriter(segment.Header{
			Lineage: r.Lineage().Bytes(), DiskID: disk.ID, Gen: 1, DiskSize: disk.Size, Kind: segment.KindPoint, Ordinal: ordinal,
		}, nil, segment.Options{})
		require.NoError(s.t, err)
		image := s.Host.At(ordinal, disk.ID)
		for c := range s.Host.Changes(ordinal, disk.ID).All() {
			for off := c.Off; off < c.End(); {
				buf := make([]byte, min(c.End()-off, segment.MaxData))
				image.ReadInto(buf, off)
				require.NoError(s.t, w.Data(off, buf))
				off += int64(len(buf))
			}
		}
		if !w.Empty() {
			body, sha, _, err := w.Finish()
			require.NoError(s.t, err)
			seg, err := r.PutSegment(ctx, replica.SegmentKey{Kind: kind, Ordinal: p.Point, Tx: tx, DiskID: disk.ID}, body, sha)
			require.NoError(s.t, err)
			disk.Segments = append(disk.Segments, seg)
		}
		p.Disks = append(p.Disks, disk)
	}
	return r.Commit(ctx, p)
}

// Replica opens the lineage.
func (s *Site) Replica() *replica.Replica {
	s.t.Helper()
	r, err := replica.Open(testkit.Context(s.t), s.Store, Lineage)
	require.NoError(s.t, err)
	return r
}

// RequirePoint materialises a point and compares every disk with what the host held at its cut.
func (s *Site) RequirePoint(ordinal uint64) {
	s.t.Helper()
	sink := &imageSink{images: map[string]*Image{}}
	_, err := s.Replica().Materialise(testkit.Context(s.t), replica.Ordinal(ordinal), sink, replica.MaterialiseOptions{})
	require.NoError(s.t, err)
	for _, d := range s.Host.Disks() {
		got, ok := sink.images[d.GetId()]
		require.True(s.t, ok, "disk %s", d.GetId())
		require.EqualValues(s.t, -1, s.Host.At(ordinal, d.GetId()).FirstDifference(got), "disk %s of point %d: first difference", d.GetId(), ordinal)
	}
}

// RequireReplicaDisks compares the replica's page blobs with what the host held at a cut.
func (s *Site) RequireReplicaDisks(ordinal uint64) {
	s.t.Helper()
	ctx := testkit.Context(s.t)
	st, err := s.Replica().Refresh(ctx)
	require.NoError(s.t, err)
	for _, d := range st.Disks() {
		image := NewImage(d.Size)
		c := s.Store.Container(replica.Lineage(Lineage).ReplicaContainer())
		for r, err := range c.PageRanges(ctx, replica.DiskBlobName(d.ID, d.Gen), "", 0, d.Size) {
			require.NoError(s.t, err)
			for off := r.Offset; off < r.Offset+r.Length; off += BlockSize {
				buf := make([]byte, min(BlockSize, r.Offset+r.Length-off))
				require.NoError(s.t, c.ReadPages(ctx, replica.DiskBlobName(d.ID, d.Gen), "", off, buf))
				image.WriteAt(buf, off)
			}
		}
		require.EqualValues(s.t, -1, s.Host.At(ordinal, d.ID).FirstDifference(image), "replica disk %s: first difference to point %d", d.ID, ordinal)
	}
}

// imageSink materialises into images.
type imageSink struct {
	mu     sync.Mutex
	images map[string]*Image
}

func (s *imageSink) Disk(_ context.Context, d replica.DiskState) (replica.DiskSink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[d.ID] = NewImage(d.Size)
	return imageDisk{s.images[d.ID]}, nil
}

type imageDisk struct{ image *Image }

func (d imageDisk) WriteAt(_ context.Context, p []byte, off int64) error {
	if r := (extent.Range{Off: off, Len: int64(len(p))}); r.End() > d.image.Size() {
		return fmt.Errorf("write %s outside a disk of %d bytes", r, d.image.Size())
	}
	d.image.WriteAt(p, off)
	return nil
}

func (d imageDisk) Finish(context.Context) error { return nil }

package changetracker

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// childEnv makes the test program a change-tracker in the folder that it names, to be killed.
const childEnv = "LANDFALL_CHANGE_TRACKER_CHILD"

// Remote is the tracker's domain over a socket: gRPC is not what dies here.
type Remote struct{ t *Tracker }

// Call is one call: arguments, and what came of it.
type Call struct {
	Op       string
	Ordinal  uint64
	Scope    Scope
	Outcome  Phase
	Disk     string
	Status   Status
	Point    Point
	Chunks   []Chunk
	Failpoin string
}

// Do runs a call.
func (r *Remote) Do(c Call, out *Call) (err error) {
	ctx := context.Background()
	keep := func(k Chunk) error {
		k.Data = bytes.Clone(k.Data)
		out.Chunks = append(out.Chunks, k)
		return nil
	}
	switch c.Op {
	case "arm":
		err = failpoint.Arm(c.Failpoin)
	case "start":
		out.Status, err = r.t.Start("vm", simLineage, 1)
	case "status":
		out.Status, err = r.t.Status("vm")
	case "cut":
		out.Point, err = r.t.Cut("vm", simLineage, c.Ordinal, 1)
	case "settle":
		out.Status, err = r.t.Settle("vm", simLineage, c.Ordinal, 1, c.Outcome)
	case "begin":
		out.Point, err = r.t.BeginPass("vm", simLineage, c.Ordinal, 1, c.Scope)
	case "settle-pass":
		out.Status, err = r.t.SettlePass("vm", simLineage, c.Ordinal, 1, c.Outcome)
	case "changes":
		err = r.t.ReadChanges(ctx, "vm", simLineage, c.Ordinal, c.Disk, 0, keep)
	case "ranges":
		err = r.t.ReadRanges(ctx, "vm", simLineage, c.Ordinal, c.Disk, extent.Range{}, nil, keep)
	}
	return err
}

// runChild serves the machine of a folder until it is killed.
func runChild() {
	dir := os.Getenv(childEnv)
	die := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	s, err := New(context.Background(), Config{StateDir: filepath.Join(dir, "state"), NBDAddress: "unix:" + filepath.Join(dir, "nbd"), MaxLogEntries: 1 << 20},
		Deps{Clock: time.Now, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))})
	die(err)
	spec := MachineSpec{ID: "vm", Dir: dir}
	for _, d := range killDisks {
		spec.Disks = append(spec.Disks, DiskSpec{ID: d, Path: filepath.Join(dir, d+".img"), Format: Raw})
	}
	_, err = s.tracker.Attach(spec)
	die(err)
	die(rpc.Register(&Remote{s.tracker}))
	lis, err := net.Listen("unix", filepath.Join(dir, "control"))
	die(err)
	go rpc.Accept(lis)
	fmt.Println("ready")
	die(s.Run(context.Background()))
}

var killDisks = []string{"os", "data"}

const killSize = 4<<20 + 1024

// child is the process and the connections to it.
type child struct {
	cmd     *exec.Cmd
	control *rpc.Client
	disks   map[string]net.Conn
}

func startChild(t *testing.T, dir string) *child {
	t.Helper()
	_ = os.Remove(filepath.Join(dir, "control")) // left by the one that was killed
	cmd := exec.CommandContext(testkit.Context(t), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ready := make([]byte, 6)
	_, err = io.ReadFull(out, ready)
	require.NoError(t, err)
	c := &child{cmd: cmd, disks: map[string]net.Conn{}}
	c.control, err = rpc.Dial("unix", filepath.Join(dir, "control"))
	require.NoError(t, err)
	for _, d := range killDisks {
		nc, err := net.Dial("unix", filepath.Join(dir, "nbd"))
		require.NoError(t, err)
		hello := make([]byte, 18)
		_, err = io.ReadFull(nc, hello)
		require.NoError(t, err)
		name := "vm/" + d
		b := append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x01"...)
		b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
		_, err = nc.Write(append(b, name...))
		require.NoError(t, err)
		_, err = io.ReadFull(nc, make([]byte, 10))
		require.NoError(t, err)
		c.disks[d] = nc
	}
	return c
}

// kill ends the process by SIGKILL and waits for it.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait() // "signal: killed"
	_ = c.control.Close()
	for _, nc := range c.disks {
		_ = nc.Close()
	}
}

// request sends one NBD command and waits for its answer.
func (c *child) request(disk string, kind uint16, off, n int64, data []byte) error {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint32(b, uint32(kind))
	b = binary.BigEndian.AppendUint64(b, 1)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	if _, err := c.disks[disk].Write(append(b, data...)); err != nil {
		return err
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(c.disks[disk], reply); err != nil {
		return err
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
		return fmt.Errorf("errno %d", e)
	}
	return nil
}

// Every failpoint and random instants, with SIGKILL: no acknowledged write is lost, every point equals the image at its
// cut, and the next cycle is no full copy.
func TestKilledProcessLosesNothing(t *testing.T) {
	rounds := 2
	if testing.Short() {
		rounds = 1
	}
	dir := t.TempDir()
	model, cut, replica := map[string][]byte{}, map[string][]byte{}, map[string][]byte{}
	for _, d := range killDisks {
		model[d], replica[d] = make([]byte, killSize), make([]byte, killSize)
		require.NoError(t, os.WriteFile(filepath.Join(dir, d+".img"), model[d], 0o600))
	}
	rng := testkit.Rand(t)
	next, committed := uint64(1), map[uint64]bool{}
	points, fulls := 0, 0
	// live runs one process until it is killed or the given steps are done.
	live := func(fp string, steps int) {
		c := startChild(t, dir)
		var after sync.Once
		defer after.Do(c.kill)
		do := func(call Call) (Call, bool) {
			var out Call
			err := c.control.Call("Remote.Do", call, &out)
			if err == nil {
				return out, true
			}
			var refused rpc.ServerError
			require.NotErrorAs(t, err, &refused, call.Op)
			return out, false
		}
		if fp != "" {
			_, ok := do(Call{Op: "arm", Failpoin: fp})
			require.True(t, ok)
		}
		for range steps {
			if !guestWrites(c, rng, model, dir, t) {
				return
			}
			st, ok := do(Call{Op: "status"})
			if !ok {
				return
			}
			if st.Status.Lineage == "" {
				if _, ok = do(Call{Op: "start"}); !ok {
					return
				}
				st, ok = do(Call{Op: "status"})
			}
			var open *Point
			for i, p := range st.Status.Points {
				if p.Phase == Open {
					open = &st.Status.Points[i]
				}
			}
			switch {
			case !ok:
				return
			case open != nil && committed[open.Ordinal]:
				op := "settle"
				if open.IsPass() {
					op = "settle-pass"
				}
				if _, ok := do(Call{Op: op, Ordinal: open.Ordinal, Outcome: Committed}); !ok {
					return
				}
			case open != nil:
				op := "changes"
				if open.IsPass() {
					op = "ranges"
				}
				for _, d := range killDisks {
					out, ok := do(Call{Op: op, Ordinal: open.Ordinal, Disk: d})
					if !ok {
						return
					}
					for _, k := range out.Chunks {
						put(replica[d], k.Off, k.Len, k.Data == nil, k.Data)
					}
				}
				committed[open.Ordinal] = true
				if !open.IsPass() {
					points++
					for _, d := range killDisks {
						require.Equal(t, -1, firstDifference(replica[d], cut[d]), "point %d, disk %s", open.Ordinal, d)
					}
				}
			default:
				n := next
				next++
				call := Call{Op: "cut", Ordinal: n}
				if st.Status.PassRequired {
					call = Call{Op: "begin", Ordinal: n, Scope: DirtyOnly}
					if st.Status.Reason != None {
						call.Scope = Full
						fulls++
					}
				} else {
					for _, d := range killDisks {
						cut[d] = bytes.Clone(model[d])
					}
				}
				if _, ok := do(call); !ok {
					return
				}
			}
		}
	}
	live("", 8)
	for range rounds {
		for _, name := range failpoint.Names() {
			live(fmt.Sprintf("%s=%d*kill", name, 1+rng.IntN(2)), 12)
			live("", 1+rng.IntN(8)) // killed at no particular instant
		}
	}
	live("", 12)
	t.Logf("%d points right, %d full passes", points, fulls)
	require.Greater(t, points, 10)
	require.LessOrEqual(t, fulls, 2, "a crash costs no full copy")
}

// guestWrites writes a little; when the process dies meanwhile, the file tells how much of the write in flight is there.
func guestWrites(c *child, rng *rand.Rand, model map[string][]byte, dir string, t *testing.T) bool {
	for range 1 + rng.IntN(6) {
		d := killDisks[rng.IntN(2)]
		n := int64(1+rng.IntN(32)) * 512
		off := rng.Int64N((killSize-n)/512) * 512
		kind, data := uint16(1), make([]byte, n)
		switch rng.IntN(6) {
		case 0:
			kind = 4 // trim
		case 1:
			kind = 6 // write zeroes
		default:
			testkit.Fill(data, rng.Uint64())
		}
		payload := data
		if kind != 1 {
			payload = nil
		}
		err := c.request(d, kind, off, n, payload)
		if err == nil {
			copy(model[d][off:], data)
			continue
		}
		_ = c.cmd.Wait()
		now, err := os.ReadFile(filepath.Join(dir, d+".img"))
		require.NoError(t, err)
		copy(model[d][off:off+n], now[off:off+n]) // unacknowledged: both are right
		require.Equal(t, -1, firstDifference(now, model[d]), "an acknowledged write is lost")
		return false
	}
	return true
}

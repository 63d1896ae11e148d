package dir

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// The test binary runs itself as child processes: envChild names what a child does, envRoot the store.
const (
	envChild = "LANDFALL_DIR_TEST_CHILD"
	envRoot  = "LANDFALL_DIR_TEST_ROOT"
	envArg   = "LANDFALL_DIR_TEST_ARG"
)

var children = map[string]func(ctx context.Context, s *Store, arg string) error{
	"create": childCreate,
	"lease":  childLease,
	"number": childNumber,
	"cas":    childCAS,
	"stream": childStream,
	"stray":  childStray,
}

// child runs this process as a child and reports whether it is one.
func child() bool {
	mode := os.Getenv(envChild)
	if mode == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := Open(os.Getenv(envRoot), Options{NoSync: true})
	if err == nil {
		_, err = io.Copy(io.Discard, os.Stdin) // the starting gun
	}
	if err == nil {
		err = children[mode](ctx, s, os.Getenv(envArg))
		err = errors.Join(err, s.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child", mode, err)
		os.Exit(1)
	}
	return true
}

func spawn(t *testing.T, mode, root, arg string) *exec.Cmd {
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envChild+"="+mode, envRoot+"="+root, envArg+"="+arg)
	cmd.Stderr = os.Stderr
	return cmd
}

// runAll runs n children to their end and returns the lines that each wrote.
func runAll(t *testing.T, n int, mode, root string) [][]string {
	gun, fire, err := os.Pipe()
	require.NoError(t, err)
	cmds := make([]*exec.Cmd, n)
	outs := make([]bytes.Buffer, n)
	for i := range n {
		cmds[i] = spawn(t, mode, root, strconv.Itoa(i))
		cmds[i].Stdin, cmds[i].Stdout = gun, &outs[i]
		require.NoError(t, cmds[i].Start())
	}
	require.NoError(t, errors.Join(gun.Close(), fire.Close()))
	lines := make([][]string, n)
	for i := range n {
		require.NoError(t, cmds[i].Wait())
		lines[i] = strings.Fields(outs[i].String())
	}
	return lines
}

// openReal opens a store on the machine's clock with a container "box".
func openReal(t *testing.T, root string) (*Store, blobstore.Container, context.Context) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	s, err := Open(root, Options{NoSync: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	require.NoError(t, s.CreateContainer(ctx, "box"))
	return s, s.Container("box"), ctx
}

const raceNames = 150

// childCreate tries to create every name and prints those that it won.
func childCreate(ctx context.Context, s *Store, arg string) error {
	c := s.Container("box")
	for i := range raceNames {
		body := strings.Repeat(arg, 5000)
		_, err := c.Put(ctx, fmt.Sprintf("log/%04d", i), strings.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		switch {
		case err == nil:
			fmt.Println(i)
		case !errors.Is(err, blobstore.ErrExists):
			return err
		}
	}
	return nil
}

func TestProcessesCreateOnly(t *testing.T) {
	_, c, ctx := openReal(t, t.TempDir())
	winners := map[string]int{}
	for i, won := range runAll(t, 4, "create", c.(*container).s.root) {
		for _, name := range won {
			require.NotContains(t, winners, name, "two processes created one blob")
			winners[name] = i
		}
	}
	require.Len(t, winners, raceNames)
	for name, i := range winners {
		no, err := strconv.Atoi(name)
		require.NoError(t, err)
		r, _, err := c.Get(ctx, fmt.Sprintf("log/%04d", no), 0, -1)
		require.NoError(t, err)
		body, err := io.ReadAll(r)
		require.NoError(t, err)
		require.NoError(t, r.Close())
		require.Equal(t, strings.Repeat(strconv.Itoa(i), 5000), string(body))
	}
}

const countTo = 800

// childLease takes the lease from whoever has it, counts a few steps in page 0 under it and is then
// overthrown. Each value it wrote is printed: if a write of an overthrown holder ever landed, two
// processes would print the same value.
func childLease(ctx context.Context, s *Store, _ string) error {
	c := s.Container("box")
	buf := make([]byte, blobstore.PageSize)
	for {
		id := blobstore.LeaseID(uuid.NewString())
		if err := c.BreakLease(ctx, "disk"); err != nil {
			return err
		}
		if err := c.AcquireLease(ctx, "disk", id, time.Minute); errors.Is(err, blobstore.ErrLeaseConflict) {
			continue
		} else if err != nil {
			return err
		}
		for {
			if err := c.ReadPages(ctx, "disk", "", 0, buf); err != nil {
				return err
			}
			n := binary.LittleEndian.Uint64(buf)
			if n >= countTo {
				return nil
			}
			binary.LittleEndian.PutUint64(buf, n+1)
			_, err := c.WritePages(ctx, "disk", 0, buf, blobstore.Conditions{Lease: id})
			if errors.Is(err, blobstore.ErrLeaseConflict) {
				break
			}
			if err != nil {
				return err
			}
			fmt.Println(n + 1)
			if rand.IntN(20) == 0 {
				if _, err := c.SetSequence(ctx, "disk", int64(n), blobstore.Conditions{Lease: id}); err != nil && !errors.Is(err, blobstore.ErrLeaseConflict) {
					return err
				}
			}
		}
	}
}

// childNumber counts in the sequence number.
func childNumber(ctx context.Context, s *Store, _ string) error {
	c := s.Container("box")
	for {
		p, err := c.Stat(ctx, "disk", "")
		if err != nil || p.Sequence >= countTo {
			return err
		}
		_, err = c.SetSequence(ctx, "disk", p.Sequence+1, blobstore.Conditions{IfSequence: &p.Sequence})
		if err == nil {
			fmt.Println(p.Sequence + 1)
		} else if !errors.Is(err, blobstore.ErrConditionFailed) {
			return err
		}
	}
}

// childCAS counts in a block blob under If-Match.
func childCAS(ctx context.Context, s *Store, _ string) error {
	c := s.Container("box")
	for {
		r, p, err := c.Get(ctx, "cas", 0, -1)
		if err != nil {
			return err
		}
		raw, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		n, err := strconv.Atoi(string(raw))
		if err != nil || n >= countTo {
			return err
		}
		body := strconv.Itoa(n + 1)
		_, err = c.Put(ctx, "cas", strings.NewReader(body), int64(len(body)), blobstore.Conditions{IfMatch: p.ETag})
		if err == nil {
			fmt.Println(body)
		} else if !errors.Is(err, blobstore.ErrConditionFailed) {
			return err
		}
	}
}

// TestProcessesCount: every step of a count kept under a condition is made by exactly one process.
func TestProcessesCount(t *testing.T) {
	for _, mode := range []string{"lease", "number", "cas"} {
		t.Run(mode, func(t *testing.T) {
			s, c, ctx := openReal(t, t.TempDir())
			_, err := c.CreatePages(ctx, "disk", 4096, nil, blobstore.Conditions{})
			require.NoError(t, err)
			_, err = c.Put(ctx, "cas", strings.NewReader("0"), 1, blobstore.Conditions{})
			require.NoError(t, err)
			seen := map[string]bool{}
			for i, lines := range runAll(t, 3, mode, s.root) {
				t.Logf("process %d made %d steps", i, len(lines))
				for _, n := range lines {
					require.False(t, seen[n], "step %s was made twice", n)
					seen[n] = true
				}
			}
			require.Len(t, seen, countTo)
		})
	}
}

const (
	streamSize = 1 << 20
	streamPart = 256 << 10
)

func streamBody(n int64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(n)), 100+int(n*7919%20000))
}

func streamPart8(n int64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(n)), streamPart/8)
}

// childStream works like an applier and a shipper and prints what it was promised.
func childStream(ctx context.Context, s *Store, arg string) error {
	c := s.Container("box")
	n, err := strconv.ParseInt(arg, 10, 64)
	if err != nil {
		return err
	}
	id := blobstore.LeaseID(uuid.NewString())
	if err := errors.Join(c.BreakLease(ctx, "disk"), c.AcquireLease(ctx, "disk", id, time.Minute)); err != nil {
		return err
	}
	for ; ; n++ {
		body := streamBody(n)
		if _, err := c.Put(ctx, fmt.Sprintf("seg/%d/x", n), bytes.NewReader(body), int64(len(body)), blobstore.Conditions{}); err != nil {
			return err
		}
		fmt.Println("put", n)
		if _, err := c.SetSequence(ctx, "disk", 2*n+1, blobstore.Conditions{Lease: id}); err != nil {
			return err
		}
		part := streamPart8(n)
		for at := int64(0); at < streamSize; at += streamPart {
			if _, err := c.WritePages(ctx, "disk", at, part, blobstore.Conditions{Lease: id}); err != nil {
				return err
			}
		}
		p, err := c.SetSequence(ctx, "disk", 2*n+2, blobstore.Conditions{Lease: id})
		if err != nil {
			return err
		}
		fmt.Println("rest", n)
		if n%3 == 0 {
			if _, _, err := c.SnapshotPages(ctx, "disk", nil, blobstore.Conditions{IfMatch: p.ETag}); err != nil {
				return err
			}
			fmt.Println("snap", n)
		}
		if n >= 4 {
			if err := c.Delete(ctx, fmt.Sprintf("seg/%d/x", n-4), blobstore.Conditions{}); err != nil && !errors.Is(err, blobstore.ErrNotFound) {
				return err
			}
			fmt.Println("del", n-4)
		}
		if n%7 == 0 {
			name := fmt.Sprintf("short/%d", n)
			if _, err := c.CreatePages(ctx, name, 4096, nil, blobstore.Conditions{}); err != nil && !errors.Is(err, blobstore.ErrExists) {
				return err
			}
			if err := c.Delete(ctx, name, blobstore.Conditions{}); err != nil {
				return err
			}
			fmt.Println("gone", n)
		}
	}
}

// killAfter starts a child, kills it after d and returns what it printed.
func killAfter(t *testing.T, cmd *exec.Cmd, d time.Duration) []string {
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var lines []string
	var timer *time.Timer
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		if timer == nil { // from the first sign of life
			timer = time.AfterFunc(d, func() { _ = cmd.Process.Kill() })
		}
		lines = append(lines, sc.Text())
	}
	require.NotNil(t, timer, "the child died by itself")
	timer.Stop()
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	require.Equal(t, "signal: killed", exit.Error())
	return lines
}

// TestKill9 kills a working process again and again and checks what it left.
func TestKill9(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	s, c, ctx := openReal(t, t.TempDir())
	_, err := c.CreatePages(ctx, "disk", streamSize, nil, blobstore.Conditions{})
	require.NoError(t, err)
	next := int64(0)
	buf := make([]byte, streamSize)
	for range rounds {
		promised := map[string]int64{"put": -1, "rest": -1, "snap": -1, "del": -1}
		lines := killAfter(t, spawn(t, "stream", s.root, fmt.Sprint(next)), time.Duration(rand.Int64N(int64(60*time.Millisecond))))
		gone := int64(-1)
		for _, l := range lines {
			var what string
			var n int64
			if k, _ := fmt.Sscan(l, &what, &n); k != 2 {
				continue // cut by the kill
			}
			promised[what] = n
			if what == "gone" {
				gone = n
			}
		}
		for n := max(0, promised["del"]+1); n <= promised["put"]; n++ {
			if n < next-4 {
				continue
			}
			_, err := c.Stat(ctx, fmt.Sprintf("seg/%d/x", n), "")
			if n >= promised["rest"]-2 { // none of those was being deleted
				require.NoError(t, err, "an acknowledged blob is missing")
			}
		}
		for p, err := range c.List(ctx, "", "") {
			require.NoError(t, err)
			var n int64
			if k, _ := fmt.Sscanf(p.Name, "seg/%d/x", &n); k == 1 {
				require.EqualValues(t, len(streamBody(n)), p.Size, "a half blob is visible")
				r, _, err := c.Get(ctx, p.Name, 0, -1)
				require.NoError(t, err)
				body, err := io.ReadAll(r)
				require.NoError(t, err)
				require.NoError(t, r.Close())
				require.True(t, bytes.Equal(streamBody(n), body), "a half blob is visible")
			}
			require.NotEqual(t, fmt.Sprintf("short/%d", gone), p.Name, "a deleted blob came back")
		}
		p, err := c.Stat(ctx, "disk", "")
		require.NoError(t, err)
		require.GreaterOrEqual(t, p.Sequence, 2*promised["rest"]+2)
		n := (p.Sequence - 1) / 2
		if p.Sequence > 0 {
			require.NoError(t, c.ReadPages(ctx, "disk", "", 0, buf))
			for at := 0; at < streamSize; at += streamPart {
				got := int64(binary.LittleEndian.Uint64(buf[at:]))
				if p.Sequence%2 == 0 {
					require.True(t, bytes.Equal(streamPart8(n), buf[at:at+streamPart]), "at rest, but not its content")
				} else {
					require.Contains(t, []int64{n, max(n-1, 0)}, got)
				}
			}
		}
		var newest int64 = -1
		for sp, err := range c.ListSnapshots(ctx, "disk") {
			require.NoError(t, err)
			require.NoError(t, c.ReadPages(ctx, "disk", sp.Snapshot, 0, buf))
			newest = (sp.Sequence - 2) / 2
			require.True(t, bytes.Equal(bytes.Repeat(streamPart8(newest), streamSize/streamPart), buf), "a half snapshot is visible")
		}
		require.GreaterOrEqual(t, newest, promised["snap"])
		if next = n; p.Sequence%2 == 0 { // an unfinished step is redone, as an applier would
			next++
		}
	}
	fresh, err := Open(s.root, Options{})
	require.NoError(t, err)
	left, err := os.ReadDir(s.root + "/" + tmpDir)
	require.NoError(t, err)
	require.Len(t, left, 2, "only the two live sessions are left")
	require.NoError(t, fresh.Close())
}

// childStray writes whole-blob values as fast as it can: a writer outside the protocol.
func childStray(ctx context.Context, s *Store, _ string) error {
	c := s.Container("box")
	fmt.Println("ready")
	for i := byte(1); ; i++ {
		if _, err := c.WritePages(ctx, "disk", 0, bytes.Repeat([]byte{i}, streamSize), blobstore.Conditions{}); err != nil {
			return err
		}
	}
}

// TestKill9ETag: a snapshot taken under an ETag holds what was there when the ETag was read, also when the
// writer in another process was killed half-way through a page write.
func TestKill9ETag(t *testing.T) {
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	s, c, ctx := openReal(t, t.TempDir())
	_, err := c.CreatePages(ctx, "disk", streamSize, nil, blobstore.Conditions{})
	require.NoError(t, err)
	matched := 0
	for range rounds {
		type look struct {
			etag blobstore.ETag
			data []byte
		}
		var looks []look
		done := make(chan error, 1)
		stop := make(chan struct{})
		go func() { // looks at the blob while the child writes and dies
			for {
				p, err := c.Stat(ctx, "disk", "")
				data := make([]byte, streamSize)
				if err == nil {
					err = c.ReadPages(ctx, "disk", "", 0, data)
				}
				if len(looks) == 3 {
					looks = looks[1:]
				}
				looks = append(looks, look{p.ETag, data})
				select {
				case <-stop:
					done <- err
					return
				default:
					if err != nil {
						done <- err
						return
					}
				}
			}
		}()
		killAfter(t, spawn(t, "stray", s.root, ""), time.Duration(rand.Int64N(int64(5*time.Millisecond))))
		close(stop)
		require.NoError(t, <-done)
		for _, l := range looks {
			id, _, err := c.SnapshotPages(ctx, "disk", nil, blobstore.Conditions{IfMatch: l.etag})
			if err != nil {
				require.ErrorIs(t, err, blobstore.ErrConditionFailed)
				continue
			}
			matched++
			got := make([]byte, streamSize)
			require.NoError(t, c.ReadPages(ctx, "disk", id, 0, got))
			require.True(t, bytes.Equal(l.data, got), "content changed under one ETag")
			require.NoError(t, c.DeleteSnapshot(ctx, "disk", id))
		}
		p, err := c.Stat(ctx, "disk", "")
		require.NoError(t, err)
		_, _, err = c.SnapshotPages(ctx, "disk", nil, blobstore.Conditions{IfMatch: p.ETag})
		require.NoError(t, err, "after one look at a dead writer's blob the ETag is good again")
	}
	t.Logf("%d looks still matched", matched)
}

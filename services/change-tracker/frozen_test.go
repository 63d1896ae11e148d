package changetracker

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const frozenSize = 6<<20 + 5*512 // not a multiple of what QEMU copies at once

// freezer is a QEMU whose disk is filled, all of it changed, and then frozen.
type freezer struct {
	*hypervisor
	conn net.Conn
	said *bufio.Scanner
	want []byte
}

// newFreezer exports the frozen disk as "os", and the guest's as "guest". options are the filter's, with the node that it is
// over; under has other nodes.
func newFreezer(t testing.TB, format string, seed uint64, options string, under ...string) *freezer {
	t.Helper()
	f := &freezer{hypervisor: newHypervisor(t), want: make([]byte, frozenSize)}
	image, scratch, monitor := f.dir+"/guest", f.dir+"/scratch", f.dir+"/m"
	tool(t, "qemu-img", "create", "-q", "-f", "raw", scratch, strconv.Itoa(frozenSize))
	tool(t, "qemu-img", "create", "-q", "-f", format, image, strconv.Itoa(frozenSize))
	args := append([]string{
		"--blockdev", "driver=" + format + ",node-name=data,discard=unmap,file.driver=file,file.discard=unmap,file.filename=" + image,
		"--blockdev", "driver=file,node-name=tmp,filename=" + scratch,
		"--chardev", "socket,id=m,server=on,wait=off,path=" + monitor, "--monitor", "chardev=m",
		"--nbd-server", "addr.type=unix,addr.path=" + f.socket(),
	}, under...)
	f.run(args...)
	testkit.Eventually(t, 10*time.Second, func() (err error) {
		f.conn, err = net.Dial("unix", monitor)
		return err
	})
	t.Cleanup(func() { _ = f.conn.Close() })
	f.said = bufio.NewScanner(f.conn)
	require.True(t, f.said.Scan())
	f.do("qmp_capabilities", `{}`)
	f.do("block-dirty-bitmap-add", `{"node":"data","name":"landfall-1"}`)
	f.do("block-export-add", `{"type":"nbd","id":"fill","node-name":"data","name":"guest","writable":true}`)
	random := rand.New(rand.NewPCG(seed, 7))
	for at := 0; at < frozenSize; at += 512 {
		if at>>16%5 != 3 {
			copy(f.want[at:at+512], bytes.Repeat([]byte{byte(1 + random.IntN(255))}, 512))
		}
	}
	fill := f.guest()
	require.NoError(t, fill.WriteAt(testkit.Context(t), f.want, 0, true))
	require.NoError(t, fill.Close())
	f.do("block-export-del", `{"id":"fill","mode":"hard"}`)
	testkit.Eventually(t, 10*time.Second, func() bool { return string(f.do("query-block-exports", `{}`)) == "[]" })
	f.do("block-dirty-bitmap-disable", `{"node":"data","name":"landfall-1"}`)
	f.do("blockdev-add", `{"driver":"copy-before-write","node-name":"cbw","target":"tmp","on-cbw-error":"break-snapshot","discard":"unmap",`+options+`}`)
	f.do("blockdev-add", `{"driver":"snapshot-access","node-name":"acc","file":"cbw"}`)
	f.do("block-export-add", `{"type":"nbd","id":"os","node-name":"acc","name":"os","bitmaps":[{"node":"data","name":"landfall-1"}]}`)
	f.do("block-export-add", `{"type":"nbd","id":"guest","node-name":"cbw","name":"guest","writable":true}`)
	return f
}

func (f *freezer) do(command, args string) []byte {
	f.t.Helper()
	_, err := fmt.Fprintf(f.conn, `{"execute":%q,"arguments":%s}`+"\n", command, args)
	require.NoError(f.t, err)
	for f.said.Scan() {
		var answer struct{ Return, Error json.RawMessage }
		require.NoError(f.t, json.Unmarshal(f.said.Bytes(), &answer))
		require.Nil(f.t, answer.Error, "%s: %s", command, answer.Error)
		if answer.Return != nil {
			return answer.Return
		}
	}
	require.Fail(f.t, "the monitor ended", "%s: %v", command, f.said.Err())
	return nil
}

func (f *freezer) guest() *nbd.Client {
	f.t.Helper()
	c, err := nbd.Dial(testkit.Context(f.t), strings.Replace(f.uri(), "/os?", "/guest?", 1))
	require.NoError(f.t, err)
	return c
}

func (f *freezer) disk() *changetrackerv1.ExportedDisk {
	d := f.hypervisor.disk()
	d.SizeBytes = frozenSize
	return d
}

// TestFrozenUnderWrites: whatever the guest overwrites, zeroes or discards while a point is read, every read has what was
// there at the cut.
func TestFrozenUnderWrites(t *testing.T) {
	rounds, formats := 1, []string{"qcow2"}
	if n, err := strconv.Atoi(os.Getenv("LANDFALL_STRESS")); err == nil {
		rounds, formats = n, []string{"raw", "qcow2", "vhdx"}
	}
	for round := range rounds {
		for _, format := range formats {
			t.Run(fmt.Sprintf("%s-%d", format, round), func(t *testing.T) { frozenUnderWrites(t, format, uint64(round)) })
		}
	}
}

func frozenUnderWrites(t *testing.T, format string, seed uint64) {
	f := newFreezer(t, format, seed, `"file":"data","cbw-timeout":10`)
	h := newBareHost(t)
	_, err := h.attachSource(pointOf(7, 1, f.disk()))
	require.NoError(t, err)
	var all errgroup.Group
	for writer := range 4 {
		guest := f.guest()
		random := rand.New(rand.NewPCG(seed, uint64(writer)))
		all.Go(func() error {
			defer guest.Close()
			noise := bytes.Repeat([]byte{0xee}, 256<<10)
			for range 60 {
				at := extent.Range{Off: random.Int64N(frozenSize/512) * 512}
				at.Len = min((1+random.Int64N(400))*512, frozenSize-at.Off)
				var err error
				switch ctx := testkit.Context(t); random.IntN(4) {
				case 0:
					err = guest.WriteAt(ctx, noise[:at.Len], at.Off, false)
				case 1:
					err = guest.WriteZeroes(ctx, at, true)
				case 2:
					err = guest.WriteZeroes(ctx, at, false)
				case 3:
					err = guest.Trim(ctx, at)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	for range 2 {
		all.Go(func() error {
			for range 2 {
				list, err := h.sourceChanges(7, 0)
				if err != nil {
					return err
				}
				if at := differs(f.want, list); at >= 0 {
					return fmt.Errorf("the frozen copy differs at %d", at)
				}
			}
			return nil
		})
	}
	require.NoError(t, all.Wait())
	list, err := h.sourceChanges(7, 0)
	require.NoError(t, err)
	covers(t, f.want, list, [2]int64{0, frozenSize})
}

// differs is where pieces are not the content; -1 when they are all of it.
func differs(content []byte, list []piece) int64 {
	at := int64(0)
	for _, p := range list {
		if p.off != at {
			return at
		}
		data := p.data
		if p.zero {
			data = make([]byte, p.n)
		}
		for i := range data {
			if content[p.off+int64(i)] != data[i] {
				return p.off + int64(i)
			}
		}
		at += p.n
	}
	if at != int64(len(content)) {
		return at
	}
	return -1
}

// TestBrokenWhileRead: QEMU's filter lets the guest overwrite what is being read once the copy is given up, and answers that
// read with the new data and no error; only reads that begin later fail. A point is read well when the copy still stood at
// its end.
func TestBrokenWhileRead(t *testing.T) {
	f := newFreezer(t, "raw", 1, `"file":"slow","cbw-timeout":1`,
		"--object", "throttle-group,id=t,x-bps-read=200000", "--blockdev", "driver=throttle,node-name=slow,throttle-group=t,file=data")
	h := newBareHost(t)
	_, err := h.attachSource(pointOf(7, 1, f.disk()))
	require.NoError(t, err)
	read := make(chan error, 1)
	const from = frozenSize/65536*65536 - 5*65536 // so little that all of it is read at once
	go func() {
		_, err := h.sourceChanges(7, from)
		read <- err
	}()
	guest := f.guest()
	late := bytes.Repeat([]byte{0xee}, 1<<20)
	require.NoError(t, guest.WriteAt(testkit.Context(t), late, 0, false)) // after a second the copy is given up for it
	require.NoError(t, guest.WriteAt(testkit.Context(t), late[:5*65536], from, false))
	require.NoError(t, guest.Close())
	is(t, <-read, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
	// Who has everything and was not told that it is good is not told so by coming back.
	_, err = h.sourceChanges(7, frozenSize)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
}

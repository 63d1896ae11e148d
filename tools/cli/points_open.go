package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
	nbd "github.com/landfall-dr/landfall/libs/nbd/server"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// renewEvery is how often an opened point is kept for another while; it lasts 15 minutes. renewAgain is the pause after
	// a try that failed.
	renewEvery = 4 * time.Minute
	renewAgain = 15 * time.Second
	// closeTimeout bounds the end of the session when the command ends.
	closeTimeout = 10 * time.Second

	// What clients of the exports may cost: NBD connections, and payloads in flight in bytes.
	openConnections = 64
	openMemory      = 128 << 20
	openDrain       = 2 * time.Second
)

type openFlags struct {
	point, listen, disk string
	patience            time.Duration
}

func (a *app) pointsOpenCommand() *cobra.Command {
	var f openFlags
	c := &cobra.Command{
		Use: "open VM --point P", Short: "Read a point's disks without restoring it, by NBD, for example to copy files out of it", Args: cobra.ExactArgs(1),
		Long: `Export the disks of a recovery point read-only by NBD on this machine, until Ctrl-C. Nothing is copied before it is
read, and the point is kept in storage as long as it is open, whatever the policy says.

Each disk is one export, named by the disk's id. NBD has no passwords: every user of this machine can read an export on
127.0.0.1; unix:PATH can be read by you alone.

--from-storage reads the store directly, with rights to read only, where nothing else is left. The point cannot be kept
then: retention, if it still runs, may take it away.

A machine that is named like a subcommand is listed by "points list NAME".`,
		Example: `  landfall points open web-01 --point 4711
  landfall points open web-01 --point latest-app --disk data --listen unix:/run/user/1000/web-01.sock
  landfall points open web-01 --from-storage https://ACCOUNT.blob.core.windows.net`,
	}
	settings := storeFlags(c, "from-storage", "read this store directly: https://ACCOUNT.blob.core.windows.net, or a folder")
	c.Flags().StringVar(&f.point, "point", "latest", "latest, latest-processed, latest-app, or a point's number")
	c.Flags().StringVar(&f.listen, "listen", "127.0.0.1:0", "where NBD clients connect: a loopback address and port (0 chooses one), or unix:PATH")
	c.Flags().StringVar(&f.disk, "disk", "", "export this disk only")
	c.Flags().DurationVar(&f.patience, "patience", time.Minute, "how long a read waits for services or storage that do not answer, before it fails")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		selector, err := parsePoint(f.point)
		if err == nil && f.patience < time.Second {
			err = errors.New("--patience is at least 1s")
		}
		if err == nil {
			_, _, err = parseListen(f.listen)
		}
		if err != nil {
			return &usageError{err, cmd.UsageString()}
		}
		if !cmd.Flags().Changed("from-storage") {
			return a.openPoint(cmd, &f, a.vmName(args[0]))
		}
		s, err := settings()
		if err != nil {
			return err
		}
		store, err := openExisting(cmd.Context(), s)
		if err != nil {
			return err
		}
		defer store.Close()
		out, reader, note, err := openFromStorage(cmd.Context(), store, args[0], selector)
		if err != nil {
			return err
		}
		if note != "" {
			fmt.Fprintln(a.err, note)
		}
		fmt.Fprintln(a.err, "the point is not pinned: retention, if it still runs, may take it away")
		return a.servePoint(cmd.Context(), &f, out, reader)
	}
	return c
}

func (a *app) openPoint(cmd *cobra.Command, f *openFlags, vm string) error {
	conn, err := a.conn("failover-orchestrator")
	if err != nil {
		return err
	}
	ctx, cancel := a.call(cmd)
	defer cancel()
	out, reader, err := openByAPI(ctx, failoverv1.NewPointServiceClient(conn), vm, f.point)
	if err != nil {
		return err
	}
	err = a.servePoint(cmd.Context(), f, out, reader)
	end, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), closeTimeout)
	defer cancel()
	if cerr := reader.close(end); cerr != nil {
		fmt.Fprintf(a.err, "the point was not closed: it stays pinned for up to 15 minutes: %v\n", cerr)
	}
	return err
}

// parseListen checks where to listen: NBD has no authentication, so only this machine may reach it.
func parseListen(s string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return "", "", errors.New("--listen unix: wants a path")
		}
		return "unix", path, nil
	}
	host, _, err := net.SplitHostPort(s)
	if err != nil {
		return "", "", fmt.Errorf("--listen: %w", err)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", "", fmt.Errorf("--listen: %q is not a loopback address, and NBD has no authentication", host)
	}
	return "tcp", s, nil
}

// listenNBD makes the listener. A Unix socket is this user's alone; one that a killed command left is replaced.
func listenNBD(s string) (net.Listener, error) {
	network, address, err := parseListen(s)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if info, serr := os.Lstat(address); serr == nil && info.Mode()&os.ModeSocket != 0 {
			if c, derr := net.DialTimeout("unix", address, time.Second); derr == nil {
				_ = c.Close()
			} else if rerr := os.Remove(address); rerr != nil {
				return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, rerr, "--listen")
			}
		}
	}
	lis, err := listenPrivately(network, address)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "--listen")
	}
	return lis, nil
}

// exportURI is where an export is, for QEMU, libnbd and nbdkit.
func exportURI(at net.Addr, export string) string {
	if at.Network() == "unix" {
		return (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + url.QueryEscape(at.String())}).String()
	}
	return (&url.URL{Scheme: "nbd", Host: at.String(), Path: "/" + export}).String()
}

// pointExports finds the disks of a point by their ids.
type pointExports map[string]*pointDisk

func (e pointExports) Exports() []string {
	names := make([]string, 0, len(e))
	for name := range e {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (e pointExports) Open(name string) (nbd.Disk, error) {
	if d, ok := e[name]; ok {
		return d, nil
	}
	return nil, fmt.Errorf("the point has no disk %q", name)
}

// servePoint exports the disks until the command is to end.
func (a *app) servePoint(ctx context.Context, f *openFlags, out *openedPoint, reader pointReader) error {
	if f.disk != "" {
		ids := make([]string, len(out.Disks))
		for i, d := range out.Disks {
			ids[i] = d.ID
		}
		i := slices.Index(ids, f.disk)
		if i < 0 {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND, "point %d has no disk %s; it has %s", out.Point, f.disk, strings.Join(ids, ", "))
		}
		out.Disks = out.Disks[i : i+1]
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	export := newPointExport(ctx, reader, f.patience, a.troubles())
	disks := pointExports{}
	for _, d := range out.Disks {
		disks[d.ID] = export.disk(d.ID, d.Size)
		// What cannot be read at all is told before anybody mounts it.
		if d.Size > 0 {
			if err := disks[d.ID].ReadAt(ctx, make([]byte, min(d.Size, nbd.SectorSize)), 0); err != nil {
				cancel()
				export.wait()
				return err
			}
		}
	}
	defer export.wait()
	defer cancel()
	lis, err := listenNBD(f.listen)
	if err != nil {
		return err
	}
	for i, d := range out.Disks {
		out.Disks[i].URI = exportURI(lis.Addr(), d.ID)
	}
	if err := a.printDocument(out, func() { a.describeOpened(out, lis.Addr()) }); err != nil {
		return errors.Join(err, lis.Close())
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if out.Pinned {
		wg.Go(func() { a.keepOpen(ctx, reader) })
	}
	logger := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return nbd.New(disks, logger, nbd.Options{Connections: openConnections, Memory: openMemory, Drain: openDrain}).Serve(ctx, lis)
}

// keepOpen renews the session while nobody reads.
func (a *app) keepOpen(ctx context.Context, reader pointReader) {
	pause := renewEvery
	for {
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		err := reader.renew(call)
		cancel()
		if pause = renewEvery; err != nil && ctx.Err() == nil {
			pause = renewAgain
			fmt.Fprintf(a.err, "the point was not kept for another while; it is tried again: %v\n", err)
		}
	}
}

// troubles tells once that reads wait, and once that they go on.
func (a *app) troubles() func(error) {
	var mu sync.Mutex
	waiting := false
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if (err != nil) == waiting {
			return
		}
		if waiting = err != nil; waiting {
			fmt.Fprintf(a.err, "reads wait: %v\n", err)
		} else {
			fmt.Fprintln(a.err, "reads go on")
		}
	}
}

func (a *app) describeOpened(o *openedPoint, at net.Addr) {
	pinned := "kept until this command ends"
	if !o.Pinned {
		pinned = "not pinned"
	}
	fmt.Fprintf(a.out, "point %d of %s, cut %s, %s\n\n", o.Point, o.VM, o.CutTime.Local().Format("2006-01-02 15:04:05.000"), pinned)
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	row(w, "DISK", "SIZE", "URI")
	for _, d := range o.Disks {
		row(w, d.ID, human(d.Size), d.URI)
	}
	_ = w.Flush()
	d := o.Disks[0]
	uri := "'" + d.URI + "'"
	fmt.Fprintf(a.out, `
copy a disk:   nbdcopy %[1]s %[2]s.raw
look inside:   guestfish --ro --format=raw -a %[1]s -i
mount files:   guestmount --ro --format=raw -a %[1]s -i /mnt
as a device:   qemu-nbd -r -f raw -c /dev/nbd0 %[1]s   (root; then mount -o ro,noload /dev/nbd0p1 /mnt)
`, uri, d.ID)
	if host, port, err := net.SplitHostPort(at.String()); err == nil && at.Network() == "tcp" {
		fmt.Fprintf(a.out, "               nbd-client %s %s /dev/nbd0 -N %s -readonly\n", host, port, d.ID)
	}
	_, _ = io.WriteString(a.out, "\nCtrl-C closes the point.\n")
}

func ordinalText(n uint64) string { return strconv.FormatUint(n, 10) }

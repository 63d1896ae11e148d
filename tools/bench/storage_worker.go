package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
)

// workerEnv makes the program one of the processes of a storage row: each side of a transfer is measured alone.
const workerEnv = "LANDFALL_BENCH_WORKER"

// profileEnv names a folder for a CPU profile of each worker.
const profileEnv = "LANDFALL_BENCH_PROFILE"

const (
	workerSink    = "sink"    // the storage account
	workerSite    = "site"    // change-tracker and uploader
	workerApply   = "apply"   // the engine of uploader:apply
	workerRestore = "restore" // materialise
)

// Worker runs the worker that this process was started as, and says whether it is one. A worker reads its task from the
// environment, prints one line of JSON and ends, at the latest when its standard input does.
func Worker(ctx context.Context) (bool, error) {
	name := os.Getenv(workerEnv)
	if name == "" {
		return false, nil
	}
	ctx, cancel := signal.NotifyContext(ctx, os.Interrupt)
	defer cancel()
	go func() { // ends with the process: nothing interrupts a read of standard input
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	task := []byte(os.Getenv(workerEnv + "_TASK"))
	if folder := os.Getenv(profileEnv); folder != "" {
		f, err := os.Create(filepath.Join(folder, fmt.Sprintf("%s-%d.pprof", name, os.Getpid())))
		if err != nil {
			return true, fmt.Errorf("profile: %w", err)
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return true, fmt.Errorf("profile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	var out any
	var err error
	switch name {
	case workerSink:
		var args []string
		if err := json.Unmarshal(task, &args); err != nil {
			return true, err
		}
		return true, azurefake.Main(ctx, args, os.Stdout)
	case workerSite:
		out, err = work(ctx, task, runSite)
	case workerApply:
		out, err = work(ctx, task, runApply)
	case workerRestore:
		out, err = work(ctx, task, runRestore)
	default:
		err = fmt.Errorf("no worker is called %q", name)
	}
	if err != nil {
		return true, fmt.Errorf("worker %s: %w", name, err)
	}
	return true, json.NewEncoder(os.Stdout).Encode(out)
}

func work[T, R any](ctx context.Context, task []byte, do func(context.Context, T) (R, error)) (any, error) {
	var t T
	if err := json.Unmarshal(task, &t); err != nil {
		return nil, err
	}
	return do(ctx, t)
}

func workerCommand(ctx context.Context, name string, task any) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	raw, err := json.Marshal(task)
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), workerEnv+"="+name, workerEnv+"_TASK="+string(raw))
	return cmd, nil
}

// workerTimeout bounds one worker.
const workerTimeout = 5 * time.Minute

// runWorker runs a worker to its end and decodes what it says.
func runWorker(ctx context.Context, name string, task, out any) (usage, error) {
	ctx, cancel := context.WithTimeout(ctx, workerTimeout)
	defer cancel()
	cmd, err := workerCommand(ctx, name, task)
	if err != nil {
		return usage{}, err
	}
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	p, err := start(cmd)
	if err != nil {
		return usage{}, err
	}
	u, err := p.wait()
	if err != nil {
		return u, fmt.Errorf("worker %s: %w", name, err)
	}
	return u, json.Unmarshal(stdout.Bytes(), out)
}

// applyTask: bring the disks of lineages up to their chains, all at once.
type applyTask struct {
	Account  account
	Lineages []replica.Lineage
}

type applyResult struct {
	// Seconds until all were done, and of each lineage; opening the store is in none.
	Seconds  float64
	Each     []float64
	Written  int64
	Requests int64
}

// applyParallel is what uploader:apply has by default.
const applyParallel = 16

func runApply(ctx context.Context, t applyTask) (out applyResult, err error) {
	store, err := openStore(ctx, t.Account)
	if err != nil {
		return out, err
	}
	defer store.Close()
	begin := time.Now()
	progress := make([]replica.Progress, len(t.Lineages))
	out.Each = make([]float64, len(t.Lineages))
	g, ctx := errgroup.WithContext(ctx)
	for i, l := range t.Lineages {
		g.Go(func() error {
			r, err := replica.Open(ctx, store, l)
			if err != nil {
				return err
			}
			progress[i], err = shipping.Drain(ctx, r, replica.ApplierOptions{Parallel: applyParallel, Lease: 30 * time.Second, Takeover: true})
			out.Each[i] = time.Since(begin).Seconds()
			return err
		})
	}
	err = g.Wait()
	out.Seconds = time.Since(begin).Seconds()
	for _, p := range progress {
		out.Written += p.Written
		out.Requests += p.Requests
	}
	return out, err
}

// restoreTask: write a point's disk to a file.
type restoreTask struct {
	Account  account
	Lineage  replica.Lineage
	Point    replica.Ordinal
	File     string
	Parallel int
}

type restoreResult struct {
	Seconds    float64
	Bytes      int64
	Checkpoint replica.Seq
}

func runRestore(ctx context.Context, t restoreTask) (out restoreResult, err error) {
	store, err := openStore(ctx, t.Account)
	if err != nil {
		return out, err
	}
	defer store.Close()
	f, err := os.Create(t.File)
	if err != nil {
		return out, fmt.Errorf("restore: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	begin := time.Now()
	r, err := replica.Open(ctx, store, t.Lineage)
	if err != nil {
		return out, err
	}
	m, err := r.Materialise(ctx, t.Point, fileSink{f}, replica.MaterialiseOptions{Parallel: t.Parallel})
	return restoreResult{Seconds: time.Since(begin).Seconds(), Bytes: m.Bytes, Checkpoint: m.Checkpoint}, err
}

// fileSink is one file for the one disk of a machine.
type fileSink struct{ f *os.File }

func (s fileSink) Disk(_ context.Context, d replica.DiskState) (replica.DiskSink, error) {
	return s, s.f.Truncate(d.Size)
}

func (s fileSink) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := s.f.WriteAt(p, off)
	return err
}

func (s fileSink) Finish(context.Context) error { return nil }

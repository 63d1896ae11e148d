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
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/segment"
)

// The machine of every row.
const (
	machine   = "bench-01"
	machineID = "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6b7e23"
)

// product is a running `landfall up` with one machine.
type product struct {
	bin, dir string
	proc     *process
	log      *os.File
}

// startProduct makes a machine folder around a disk (a hard link: no bytes are copied) and starts `landfall up` with
// nothing in its state.
func startProduct(ctx context.Context, bin, folder, image, policy string) (*product, error) {
	images := filepath.Join(folder, "images", machine)
	if err := os.MkdirAll(images, 0o750); err != nil {
		return nil, fmt.Errorf("make machine: %w", err)
	}
	if err := os.Link(image, filepath.Join(images, "os.raw")); err != nil {
		return nil, fmt.Errorf("make machine: %w", err)
	}
	definition := fmt.Sprintf("version: 1\nid: %s\nname: %s\ngeneration: 2\ncpus: 2\nmemory: 4GiB\ndisks:\n  - {id: os, image: os.raw, os: true}\n", machineID, machine)
	if err := os.WriteFile(filepath.Join(images, "vm.yaml"), []byte(definition), 0o600); err != nil {
		return nil, fmt.Errorf("make machine: %w", err)
	}
	p, err := launch(bin, folder, "--images", filepath.Join(folder, "images"))
	if err != nil {
		return nil, err
	}
	if _, err = p.export(ctx); err == nil {
		err = p.apply(ctx, policy)
	}
	if err != nil {
		_, stopped := p.end()
		return nil, errors.Join(err, stopped)
	}
	return p, nil
}

// launch starts `landfall up` with its state in a folder and machines as args say.
func launch(bin, folder string, args ...string) (*product, error) {
	log, err := os.Create(filepath.Join(folder, "landfall.log"))
	if err != nil {
		return nil, fmt.Errorf("start landfall up: %w", err)
	}
	p := &product{bin: filepath.Join(bin, "landfall"), dir: folder, log: log}
	cmd := exec.Command(p.bin, append([]string{"up", "--state", p.state()}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if p.proc, err = start(cmd); err != nil {
		_ = log.Close()
		return nil, err
	}
	return p, nil
}

// apply makes the one policy of a row.
func (p *product) apply(ctx context.Context, policy string) error {
	file := filepath.Join(p.dir, "policy.yaml")
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		return fmt.Errorf("make policy: %w", err)
	}
	return p.cli(ctx, nil, "policy", "apply", "-f", file)
}

func (p *product) state() string { return filepath.Join(p.dir, "state") }

// end stops the product and says what it took in all.
func (p *product) end() (usage, error) {
	defer p.log.Close()
	return p.proc.end()
}

// kill is end for a row that failed already.
func (p *product) kill() {
	select {
	case <-p.proc.done:
	default:
		_, _ = p.end()
	}
}

// mark is the present instant in the product's life.
type mark struct {
	at          time.Time
	cpu, system time.Duration
}

func (p *product) mark() mark {
	all, system, _ := cpuOf(p.proc.cmd.Process.Pid) // 0 where it is not measured
	return mark{at: time.Now(), cpu: all, system: system}
}

// since is what the product took since a mark; its peak memory is that of its whole life.
func (p *product) since(m mark) usage {
	now := p.mark()
	return usage{wall: now.at.Sub(m.at), cpu: now.cpu - m.cpu, system: now.system - m.system, peak: p.proc.peakSoFar()}
}

// cli runs one command and decodes its JSON into out, if there is one.
func (p *product) cli(ctx context.Context, out any, args ...string) error {
	if out != nil {
		args = append(args, "-o", "json")
	}
	said, err := p.output(ctx, args...)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(said, out); err != nil {
		return fmt.Errorf("landfall %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// output runs one command and returns what it prints.
func (p *product) output(ctx context.Context, args ...string) ([]byte, error) {
	args = append(args, "--state", p.state())
	cmd := exec.CommandContext(ctx, p.bin, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("landfall %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// waitTimeout bounds the wait for anything that the product should come to by itself.
const waitTimeout = 2 * time.Minute

// until repeats f until it says done; its last error explains a wait that was in vain.
func (p *product) until(ctx context.Context, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		done, err := f()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-p.proc.done:
			raw, _ := os.ReadFile(p.log.Name())
			return fmt.Errorf("landfall up ended: %s", raw[max(0, len(raw)-tailBytes):])
		case <-t.C:
		}
	}
}

// export waits until the machine is listed and returns the address of its disk.
func (p *product) export(ctx context.Context) (uri string, err error) {
	err = p.until(ctx, func() (bool, error) {
		var v struct {
			VMs []struct {
				Machine struct {
					Name  string `json:"display_name"`
					Disks []struct {
						URI string `json:"export_uri"`
					} `json:"disks"`
				} `json:"machine"`
			} `json:"vms"`
		}
		if err := p.cli(ctx, &v, "vms"); err != nil {
			return false, err
		}
		for _, vm := range v.VMs {
			if vm.Machine.Name == machine && len(vm.Machine.Disks) == 1 {
				uri = vm.Machine.Disks[0].URI
				return true, nil
			}
		}
		return false, errors.New("the machine is not listed")
	})
	return uri, err
}

// point is one recovery point.
type point struct {
	Ordinal   uint64 `json:"ordinal,string"`
	Stored    int64  `json:"stored_bytes,string"`
	Processed bool   `json:"processed"`
}

// points lists the newest recovery points first.
func (p *product) points(ctx context.Context) ([]point, error) {
	var v struct {
		Points []point `json:"points"`
	}
	err := p.cli(ctx, &v, "points", machine)
	return v.Points, err
}

// processed waits until the newest point is on the replica's disks.
func (p *product) processed(ctx context.Context) error {
	return p.until(ctx, func() (bool, error) {
		list, err := p.points(ctx)
		return err == nil && len(list) > 0 && list[0].Processed, errors.Join(err, errors.New("the newest point is not processed"))
	})
}

// protectionState is the state of the machine's protection.
func (p *product) protectionState(ctx context.Context) (state, lineage string, err error) {
	var v struct {
		State   string `json:"state"`
		Lineage string `json:"lineage"`
	}
	err = p.cli(ctx, &v, "status", machine)
	return v.State, v.Lineage, err
}

// drill takes a test failover of the newest point and compares its disk with the image, byte for byte.
func (p *product) drill(ctx context.Context, image string) (time.Duration, error) {
	out := filepath.Join(p.dir, "drill")
	begin := time.Now()
	if err := p.cli(ctx, nil, "failover", "test", machine, "--out", out, "--wait"); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	if err := sameDisk(ctx, p.bin, image, filepath.Join(out, "os.vhd")); err != nil {
		return took, err
	}
	return took, p.cli(ctx, nil, "failover", "cleanup", machine, "--wait")
}

// sameDisk compares two images; the product's own command does it for the peers too.
func sameDisk(ctx context.Context, landfall, a, b string) error {
	if _, err := run(ctx, landfall, "disk", "compare", a, b); err != nil {
		return fmt.Errorf("result differs from its source: %w", err)
	}
	return nil
}

// shipped is what a lineage's segments hold, in bytes.
type shipped struct {
	segments int
	// stored is the size of the objects; raw is what it would be without compression.
	stored, raw int64
}

// segments reads the index of every segment whose ordinal is above after. The product must have ended.
func (p *product) segments(ctx context.Context, lineage string, after uint64) (s shipped, err error) {
	store, err := dir.Open(filepath.Join(p.state(), "store"), dir.Options{})
	if err != nil {
		return s, fmt.Errorf("open the store: %w", err)
	}
	defer store.Close()
	for _, name := range []string{"lfj-" + lineage, "lfs-" + lineage} {
		c := store.Container(name)
		for b, err := range c.List(ctx, "seg/", "") {
			if err != nil {
				return s, fmt.Errorf("list segments: %w", err)
			}
			body, _, err := c.Get(ctx, b.Name, 0, b.Size)
			if err != nil {
				return s, fmt.Errorf("read segment %s: %w", b.Name, err)
			}
			raw, err := io.ReadAll(body)
			_ = body.Close()
			if err != nil {
				return s, fmt.Errorf("read segment %s: %w", b.Name, err)
			}
			ix, err := segment.ReadIndex(bytes.NewReader(raw), int64(len(raw)))
			if err != nil {
				return s, fmt.Errorf("read segment %s: %w", b.Name, err)
			}
			if ix.Header.Ordinal <= after {
				continue
			}
			s.segments++
			s.stored += int64(len(raw))
			s.raw += ix.DataBytes() + int64(len(raw)) - ix.StoredEnd() + headerBytes
		}
	}
	return s, nil
}

// headerBytes is what a segment has before its frames (docs/formats/segment.md).
const headerBytes = 192

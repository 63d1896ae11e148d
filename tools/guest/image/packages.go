package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// kernelMeta depends on the newest cloud kernel.
const kernelMeta = "linux-image-cloud-amd64"

// agentPackages is the guest agent and everything that it loads; names in one line are alternatives of different releases.
var agentPackages = [][]string{
	{"qemu-guest-agent"},
	{"libc6"},
	{"libglib2.0-0t64", "libglib2.0-0"},
	{"libpcre2-8-0"},
	{"libudev1"},
	{"libcap2"},
	{"liburing2"},
	{"libnuma1"},
}

// pkg is one Debian package of a version.
type pkg struct {
	Name     string `json:"name"`
	Version  string `json:"version"`
	Filename string `json:"filename"` // of the .deb in the cache
	SHA256   string `json:"sha256"`
}

// packageSet is what a guest is made of.
type packageSet struct {
	Kernel pkg   `json:"kernel"`
	Agent  []pkg `json:"agent"`
}

// lastSet remembers the set used last, for machines without apt's lists.
const lastSet = "packages.json"

// aptAttempts and aptWait bound the retries of apt: another apt on the machine makes it fail.
const (
	aptAttempts = 10
	aptWait     = 2 * time.Second
)

// resolve finds which packages are wanted.
func resolve(ctx context.Context, cache string) (packageSet, error) {
	set, err := fromApt(ctx)
	if err == nil {
		return set, nil
	}
	b, errRead := os.ReadFile(filepath.Join(cache, lastSet))
	if errRead != nil {
		return set, fmt.Errorf("find packages (does this machine need `apt-get update`?): %w", err)
	}
	if errRead := json.Unmarshal(b, &set); errRead != nil {
		return set, errors.Join(err, errRead)
	}
	return set, nil
}

func fromApt(ctx context.Context) (packageSet, error) {
	var set packageSet
	names := []string{kernelMeta}
	for _, alternatives := range agentPackages {
		names = append(names, alternatives...)
	}
	shown, err := show(ctx, names)
	if err != nil {
		return set, err
	}
	kernel := dependsOnKernel.FindString(shown[kernelMeta]["Depends"])
	if kernel == "" {
		return set, fmt.Errorf("%s: apt's lists have no kernel for it", kernelMeta)
	}
	kernels, err := show(ctx, []string{kernel})
	if err != nil {
		return set, err
	}
	if set.Kernel, err = toPackage(kernels, kernel); err != nil {
		return set, err
	}
	for _, alternatives := range agentPackages {
		p, err := toPackage(shown, alternatives...)
		if err != nil {
			return set, err
		}
		set.Agent = append(set.Agent, p)
	}
	return set, nil
}

var dependsOnKernel = regexp.MustCompile(`linux-image-[0-9][^ ,]*`)

// show asks apt for the fields of the versions that it would install.
func show(ctx context.Context, names []string) (map[string]map[string]string, error) {
	// An unknown name makes apt-cache fail after it showed the others: alternatives are expected to be unknown.
	out, err := command(ctx, "", nil, "apt-cache", append([]string{"show", "--no-all-versions", "--quiet=2"}, names...)...)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	shown := map[string]map[string]string{}
	for _, paragraph := range strings.Split(string(out), "\n\n") {
		fields := map[string]string{}
		lines := bufio.NewScanner(strings.NewReader(paragraph))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if key, value, ok := strings.Cut(lines.Text(), ": "); ok && !strings.HasPrefix(key, " ") {
				fields[key] = value
			}
		}
		if name := fields["Package"]; name != "" && shown[name] == nil {
			shown[name] = fields
		}
	}
	return shown, nil
}

// toPackage takes the first of the alternatives that apt knows.
func toPackage(shown map[string]map[string]string, alternatives ...string) (pkg, error) {
	for _, name := range alternatives {
		if f := shown[name]; f != nil && f["Filename"] != "" && f["SHA256"] != "" {
			return pkg{Name: name, Version: f["Version"], Filename: path.Base(f["Filename"]), SHA256: f["SHA256"]}, nil
		}
	}
	return pkg{}, fmt.Errorf("package %s: not in apt's lists", strings.Join(alternatives, " or "))
}

// fetch makes sure that a package is in the cache and is what apt's signed lists promise, and returns its path.
func fetch(ctx context.Context, cache string, p pkg) (string, error) {
	file := filepath.Join(cache, p.Filename)
	if has(file, p.SHA256) {
		return file, nil
	}
	tmp, err := os.MkdirTemp(cache, ".download-")
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil { // apt drops its privileges
		return "", fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	tick := time.NewTicker(aptWait)
	defer tick.Stop()
	for attempt := 1; ; attempt++ {
		_, err = command(ctx, tmp, nil, "apt-get", "download", "--quiet", p.Name+"="+p.Version)
		if err == nil || attempt == aptAttempts || ctx.Err() != nil {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	if err != nil {
		return "", fmt.Errorf("fetch %s %s: %w", p.Name, p.Version, err)
	}
	got, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(got) != 1 {
		return "", fmt.Errorf("fetch %s: apt-get left %d files", p.Name, len(got))
	}
	if !has(got[0], p.SHA256) {
		return "", fmt.Errorf("fetch %s %s: its SHA-256 is not the one in apt's lists", p.Name, p.Version)
	}
	if err := os.Rename(got[0], file); err != nil {
		return "", fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	return file, nil
}

// has tells whether a file is there with this SHA-256.
func has(file, sum string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return false
	}
	return hex.EncodeToString(h.Sum(nil)) == sum
}

// unpack takes the files that want accepts out of a package into a folder of
// the cache, keyed by the package's hash and by what is wanted of it; a
// package is unpacked once. Links are kept as links.
func unpack(ctx context.Context, cache string, p pkg, key string, want func(name string) bool) (string, error) {
	dir := filepath.Join(cache, fmt.Sprintf("%s_%.16s_%s", p.Name, p.SHA256, key))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	deb, err := fetch(ctx, cache, p)
	if err != nil {
		return "", err
	}
	content, err := command(ctx, "", nil, "dpkg-deb", "--fsys-tarfile", deb)
	if err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, ".unpack-")
	if err != nil {
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	defer os.RemoveAll(tmp)
	if err := untar(content, tmp, want); err != nil {
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, errStat := os.Stat(dir); errStat == nil {
			return dir, nil // another build was faster
		}
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	return dir, nil
}

func untar(content []byte, dir string, want func(string) bool) error {
	r := tar.NewReader(bytes.NewReader(content))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		if !want(name) || h.Typeflag == tar.TypeDir {
			continue
		}
		to := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeReg:
			f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, h.FileInfo().Mode().Perm())
			if err != nil {
				return err
			}
			_, err = io.Copy(f, r)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
		case tar.TypeSymlink:
			if err := os.Symlink(h.Linkname, to); err != nil {
				return err
			}
		}
	}
}

// remember keeps the set for machines without apt's lists.
func remember(cache string, set packageSet) error {
	b, err := json.MarshalIndent(set, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(cache, fmt.Sprintf(".%s-%d", lastSet, os.Getpid()))
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return fmt.Errorf("remember packages: %w", err)
	}
	return os.Rename(tmp, filepath.Join(cache, lastSet))
}

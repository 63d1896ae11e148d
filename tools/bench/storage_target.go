package bench

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

// The link and the distance of the capped sink: what one page blob of Azure takes, and a region not far away.
const (
	linkRate    = 63e6 // bytes/s
	linkLatency = 20 * time.Millisecond
)

// kindOf says what a row stores into.
type kindOf struct {
	name string
	// sink are the flags of the sink; nil is Azurite.
	sink []string
	// unlimited turns off the limits that the product itself keeps to for a page blob of Azure: this target has none.
	unlimited bool
}

var (
	cappedSink = kindOf{name: "sink, 63 MB/s and 20 ms", sink: []string{"-bandwidth", "63e6", "-latency", "20ms", "-page-requests", "-1", "-page-bytes", "-1"}}
	openSink   = kindOf{name: "sink, uncapped", sink: []string{"-page-requests", "-1", "-page-bytes", "-1"}, unlimited: true}
	emulator   = kindOf{name: "Azurite", unlimited: true}
	// strictSink answers 503 above 500 requests/s and 60 MiB/s of a page blob, as the service does.
	strictSink = kindOf{name: "sink, 500 requests/s a blob, 63 MB/s and 20 ms", sink: []string{"-bandwidth", "63e6", "-latency", "20ms"}}
	// strictOpen has no cap shared by all bodies: the applier is on another link than the site.
	strictOpen  = kindOf{name: "sink, 500 requests/s and 60 MiB/s a blob, 20 ms", sink: []string{"-latency", "20ms"}}
	distantSink = kindOf{name: "sink, 20 ms", sink: []string{"-latency", "20ms", "-page-requests", "-1", "-page-bytes", "-1"}, unlimited: true}
)

// storageTarget is a storage account that a row uses.
type storageTarget struct {
	kindOf
	conn, control string
	pid           int
	store         blobstore.Store
	stop          func() error
}

func startTarget(ctx context.Context, k kindOf) (t *storageTarget, err error) {
	t = &storageTarget{kindOf: k}
	if k.sink == nil {
		s, err := azurite.Run(ctx, azurite.Options{})
		if err != nil {
			return nil, err
		}
		t.conn, t.pid, t.stop = s.ConnectionString(), s.Pid(), s.Stop
	} else {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("start sink: %w", err)
		}
		cmd, err := workerCommand(context.WithoutCancel(ctx), workerSink, append([]string{"-digest", "-capacity", "17179869184"}, k.sink...))
		if err != nil {
			return nil, errors.Join(err, r.Close(), w.Close())
		}
		cmd.Stdout = w
		p, err := start(cmd)
		_ = w.Close()
		if err != nil {
			return nil, errors.Join(err, r.Close())
		}
		t.pid, t.stop = cmd.Process.Pid, func() error {
			_, err := p.end()
			return errors.Join(err, r.Close())
		}
		var a azurefake.Announcement
		if err := json.NewDecoder(r).Decode(&a); err != nil {
			return nil, errors.Join(fmt.Errorf("start sink: %w", err), t.stop())
		}
		t.conn, t.control = a.ConnectionString, a.Control
	}
	if t.store, err = openStore(ctx, t.account()); err != nil {
		return nil, errors.Join(err, t.stop())
	}
	return t, nil
}

func (t *storageTarget) close() error { return errors.Join(t.store.Close(), t.stop()) }

// account is how the product's side reaches a target; it travels to workers.
type account struct {
	Connection string
	Settings   azureLimits
}

// azureLimits are the settings of backend azure that rows change.
type azureLimits struct {
	Concurrency, PageRequests int
	PageBandwidth             int64
}

func (t *storageTarget) account() account {
	a := account{Connection: t.conn}
	if t.unlimited {
		a.Settings.PageRequests, a.Settings.PageBandwidth = -1, 1
	}
	if t.sink == nil {
		a.Settings.Concurrency = 8 // Azurite is one thread
	}
	return a
}

func openStore(ctx context.Context, a account) (blobstore.Store, error) {
	s := backend.Settings{Azure: azure.DefaultSettings()}
	s.Azure.ConnectionString = config.NewSecret(a.Connection)
	if n := a.Settings.Concurrency; n != 0 {
		s.Azure.Concurrency = n
	}
	if n := a.Settings.PageRequests; n != 0 {
		s.Azure.PageRequests = n
	}
	if n := a.Settings.PageBandwidth; n != 0 {
		s.Azure.PageBandwidth = config.ByteSize(n)
	}
	return backend.Open(ctx, s, backend.Options{})
}

// ask calls the sink's control address.
func ask(ctx context.Context, method, at string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, at, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ask the sink: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the sink: %s", resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// moved is what a target has seen.
type moved struct {
	// blocks and pages are bytes of bodies sent to block blobs and to page blobs; requests are all that were answered.
	blocks, pages              int64
	requests, refused, pageOps int64
}

// stats are the sink's counters; Azurite has none.
func (t *storageTarget) stats(ctx context.Context) (m moved, err error) {
	if t.control == "" {
		return m, nil
	}
	return sinkStats(ctx, t.control)
}

func sinkStats(ctx context.Context, control string) (m moved, err error) {
	var s azurefake.Stats
	if err := ask(ctx, http.MethodGet, control+"stats", &s); err != nil {
		return m, err
	}
	for _, name := range []string{"PutBlob", "PutBlock"} {
		m.blocks += s.Operations[name].BytesIn
	}
	m.pages = s.Operations["PutPage"].BytesIn
	for _, c := range s.Operations {
		m.requests += c.Requests
	}
	for _, name := range []string{"PutPage", "ClearPages", "GetPageRanges"} {
		m.pageOps += s.Operations[name].Requests
	}
	m.refused = s.Codes["ServerBusy"]
	return m, nil
}

func (t *storageTarget) reset(ctx context.Context) error {
	if t.control == "" {
		return nil
	}
	return ask(ctx, http.MethodPost, t.control+"reset", &struct{}{})
}

// cpu of the server so far; 0 where it is not measured.
func (t *storageTarget) cpu() time.Duration {
	all, _, _ := cpuOf(t.pid)
	return all
}

const verifyChunk = blobstore.MaxPageWrite

// samePages proves that a page blob holds the disk, footer apart. A blob of which each page was written once is proved by
// the sink's digest of what it took in; another one, and any on Azurite, is read back.
func (t *storageTarget) samePages(ctx context.Context, container, name string, d disk, footer []byte) error {
	if t.control != "" {
		var b azurefake.BlobState
		if err := ask(ctx, http.MethodGet, t.control+"blob?"+url.Values{"container": {container}, "name": {name}}.Encode(), &b); err != nil {
			return err
		}
		want, err := d.digest()
		if err != nil {
			return err
		}
		if b.Digest == want+azurefake.PageDigest(d.size, footer) && b.Size == d.size+int64(len(footer)) {
			return nil
		}
	}
	f, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("compare page blob: %w", err)
	}
	defer f.Close()
	c := t.store.Container(container)
	var valid extent.Set
	for r, err := range c.PageRanges(ctx, name, "", 0, d.size) {
		if err != nil {
			return fmt.Errorf("compare page blob: %w", err)
		}
		valid.Add(extent.Range{Off: r.Offset, Len: r.Length})
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for off := int64(0); off < d.size; off += verifyChunk {
		g.Go(func() error {
			want, got := make([]byte, min(verifyChunk, d.size-off)), []byte(nil)
			got = make([]byte, len(want))
			if _, err := f.ReadAt(want, off); err != nil {
				return fmt.Errorf("compare page blob: %w", err)
			}
			if valid.Overlaps(extent.Range{Off: off, Len: int64(len(got))}) {
				if err := c.ReadPages(ctx, name, "", off, got); err != nil {
					return fmt.Errorf("compare page blob: %w", err)
				}
			}
			if !bytes.Equal(want, got) {
				return fmt.Errorf("page blob %s/%s differs from its source in the 4 MiB at %d", container, name, off)
			}
			return nil
		})
	}
	return g.Wait()
}

// digest is the sink's digest of the disk's content.
func (d disk) digest() (sum uint64, err error) {
	f, err := os.Open(d.path)
	if err != nil {
		return 0, fmt.Errorf("digest of disk: %w", err)
	}
	defer f.Close()
	p := make([]byte, mib)
	for off := int64(0); off < d.size; off += mib {
		if _, err := f.ReadAt(p, off); err != nil {
			return 0, fmt.Errorf("digest of disk: %w", err)
		}
		sum += azurefake.PageDigest(off, p)
	}
	return sum, nil
}

// sameFile proves that a file begins with the disk.
func (d disk) sameFile(path string) error {
	a, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("compare copy: %w", err)
	}
	defer a.Close()
	b, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("compare copy: %w", err)
	}
	defer b.Close()
	p, q := make([]byte, mib), make([]byte, mib)
	for off := int64(0); off < d.size; off += mib {
		if _, err := a.ReadAt(p, off); err != nil {
			return fmt.Errorf("compare copy: %w", err)
		}
		if _, err := b.ReadAt(q, off); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("compare copy: %w", err)
		}
		if !bytes.Equal(p, q) {
			return fmt.Errorf("copy differs from its source in the MiB at %d", off)
		}
	}
	return nil
}

// part is one setting of a connection string.
func part(conn, key string) string {
	for s := range strings.SplitSeq(conn, ";") {
		if v, ok := strings.CutPrefix(s, key+"="); ok {
			return v
		}
	}
	return ""
}

// sas makes an account SAS for a peer.
func sas(conn string) (string, error) {
	key, err := base64.StdEncoding.DecodeString(part(conn, "AccountKey"))
	if err != nil {
		return "", fmt.Errorf("key of the account: %w", err)
	}
	const version, stamp = "2022-11-02", "2006-01-02T15:04:05Z"
	from, to := time.Now().Add(-5*time.Minute).UTC().Format(stamp), time.Now().Add(time.Hour).UTC().Format(stamp)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(strings.Join([]string{part(conn, "AccountName"), "rwdlac", "b", "sco", from, to, "", "https,http", version, "", ""}, "\n")))
	return url.Values{
		"sv": {version}, "ss": {"b"}, "srt": {"sco"}, "sp": {"rwdlac"}, "st": {from}, "se": {to}, "spr": {"https,http"},
		"sig": {base64.StdEncoding.EncodeToString(mac.Sum(nil))},
	}.Encode(), nil
}

// azcopyPath finds the peer: on PATH, or where npm puts it.
func azcopyPath(root string) string {
	return filepath.Join(root, "tools", "bench", "azcopy", "node_modules", "@azure-tools", "azcopy-linux", "dist", "bin", "azcopy_linux_amd64")
}

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	"github.com/landfall-dr/landfall/tools/cli"
)

// keepEnv keeps the folders of tests that passed, too.
const keepEnv = "LANDFALL_E2E_KEEP"

// product is one installation of Landfall, in either form.
type product struct {
	t testing.TB
	// dir holds everything; state has client.yaml, images the machines.
	dir, state, images string
	// storage is where the lineages are, storeConfig the same as programs read it.
	storage     backend.Settings
	storeConfig map[string]any
	programs    map[string]*process
	order       []string // of starting

	dialer *rpc.Dialer
	api    schedulerv1.ProtectionServiceClient
	jobs   schedulerv1.JobServiceClient
}

// form makes an installation of one kind; it is not started yet.
type form struct {
	name string
	make func(t testing.TB) *product
	// qemu is the same with QEMU's machines.
	qemu func(t testing.TB) *product
}

var forms = []form{
	formOf("up", onDir), formOf("fleet", onAzurite),
}

func init() {
	if os.Getenv(wholeStorageEnv) != "" {
		forms = append(forms, formOf("up", onAzurite), formOf("fleet", onDir))
	}
}

func formOf(kind string, on storage) form {
	f := form{name: kind + "-" + string(on)}
	if kind == "up" {
		f.make = func(t testing.TB) *product { return newUpOf(t, on, "--images") }
		f.qemu = func(t testing.TB) *product { return newUpOf(t, on, "--qemu") }
		return f
	}
	f.make = func(t testing.TB) *product { return newFleet(t, on, true) }
	f.qemu = func(t testing.TB) *product { return newFleetOf(t, on, false, driverQEMU) }
	return f
}

// Drivers of host-provider.
const (
	driverImagedir = "imagedir"
	driverQEMU     = "qemu"
)

func newProduct(t testing.TB, on storage) *product {
	dir, err := os.MkdirTemp("", "landfall-e2e-")
	require.NoError(t, err)
	p := &product{t: t, dir: dir, state: filepath.Join(dir, "state"), images: filepath.Join(dir, "images"), programs: map[string]*process{}}
	require.NoError(t, os.MkdirAll(p.state, 0o700))
	p.useStorage(on)
	t.Cleanup(func() {
		if p.dialer != nil {
			_ = p.dialer.Close()
		}
		p.killAll()
		if !t.Failed() && os.Getenv(keepEnv) == "" {
			_ = os.RemoveAll(dir)
			return
		}
		t.Logf("state, store and logs are kept in %s", dir)
		for _, name := range p.order {
			if !t.Failed() {
				break
			}
			t.Logf("end of %s.log:\n%s", name, p.programs[name].tail(2500))
		}
	})
	return p
}

func (p *product) add(name, path, armEnv string, args ...string) *process {
	q := newProcess(p.dir, name, path, armEnv, args...)
	p.programs[name], p.order = q, append(p.order, name)
	return q
}

// newUp is `landfall up`.
func newUp(t testing.TB, on storage) *product { return newUpOf(t, on, "--images") }

// newUpOf names the machines by a flag, --images or --qemu.
func newUpOf(t testing.TB, on storage, flag string) *product {
	p := newProduct(t, on)
	p.add(landfall, program(t, landfall), "LANDFALL_FAILPOINTS", "up", "--state", p.state, flag, p.images,
		"--listen", freeAddr(t), "--nbd-listen", freeAddr(t), "--config", p.storeFile())
	return p
}

// newFleet is a nats-server and the six programs, each with its own certificate and configuration. Twins adds a second
// uploader and a standby scheduler.
func newFleet(t testing.TB, on storage, twins bool) *product {
	return newFleetOf(t, on, twins, driverImagedir)
}

// newFleetOf has hosts of a driver, and more programs, as orchestrator2.
func newFleetOf(t testing.TB, on storage, twins bool, driver string, more ...string) *product {
	p := newProduct(t, on)
	authority, err := pki.Open(filepath.Join(p.dir, "pki"), time.Now)
	require.NoError(t, err)
	certify := func(name string, id pki.Identity) string {
		dir := filepath.Join(p.dir, "certificates", name)
		_, err := authority.Ensure(dir, pki.Request{Identity: id})
		require.NoError(t, err)
		return dir
	}
	busAddr := freeAddr(t)
	server := certify(natsServer, pki.ServiceIdentity(natsServer))
	conf := filepath.Join(p.dir, "nats.conf")
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, `
listen: %q
server_name: landfall-e2e
tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }
jetstream { store_dir: %q, sync_interval: always, max_file_store: 64GB }
`, busAddr, filepath.Join(server, pki.CertFile), filepath.Join(server, pki.KeyFile), filepath.Join(server, pki.CAFile), filepath.Join(p.dir, "nats")), 0o600))
	p.add(natsServer, program(t, natsServer), "LANDFALL_UNUSED", "-c", conf)

	address := map[string]string{}
	for _, name := range append([]string{uploader2, scheduler2, orchestrator2}, services...) {
		address[name] = freeAddr(t)
	}
	sections := map[string]map[string]any{
		tracker:      {"state_dir": filepath.Join(p.dir, "host"), "nbd_address": freeAddr(t)},
		host:         {"host": "host-1", "images": p.images, "address": address[host], "change_tracker_address": address[tracker], "scan_interval": "1s", "heartbeat": "1s"},
		uploaderName: {"ship": map[string]any{"retry_delay": "100ms", "resume_wait": "100ms", "host_timeout": "5s"}, "apply": map[string]any{"lease": "15s", "busy_delay": "1s", "busy_deliveries": 100, "lazy": map[string]any{"mode": "off"}}},
		resync:       {"window_bytes": 8 * mib, "retry_delay": "100ms", "resume_wait": "100ms", "host_timeout": "5s"},
		scheduler:    {"window_bytes": 8 * mib, "lease_ttl": "2s", "poll": "1s", "retry_unit": "500ms", "call_timeout": "5s"},
		orchestrator: {"lease_ttl": "2s", "retry_delay": "500ms"},
	}
	if driver == driverQEMU {
		delete(sections[host], "images")
		sections[host]["driver"] = driverQEMU
		sections[host]["qemu"] = map[string]any{"machines": p.images, "state_dir": filepath.Join(p.dir, "q")}
	}
	names := services
	if twins {
		names = append(append([]string(nil), services...), uploader2, scheduler2)
	}
	names = slices.Concat(names, more)
	for _, name := range names {
		service := strings.TrimSuffix(name, "-2")
		id := pki.ServiceIdentity(service)
		if service == host || service == tracker {
			id = id.On("host-1")
		}
		certs := certify(name, id)
		general := map[string]any{
			"listen": address[name], "certificates": certs, "drain_delay": "0s",
			"peers": map[string]any{tracker: address[tracker], scheduler: address[scheduler]},
			"bus": map[string]any{
				"url": "tls://" + busAddr, "ack_wait": "2s",
				"ca": filepath.Join(certs, pki.CAFile), "cert": filepath.Join(certs, pki.CertFile), "key": filepath.Join(certs, pki.KeyFile),
			},
			"log": map[string]any{"format": "text"},
		}
		if service != tracker && service != host {
			general["store"] = p.storeConfig
		}
		raw, err := yaml.Marshal(map[string]any{"program": general, strings.ReplaceAll(service, "-", "_"): sections[service]})
		require.NoError(t, err)
		file := filepath.Join(p.dir, name+".yaml")
		require.NoError(t, os.WriteFile(file, raw, 0o600))
		p.add(name, program(t, service), "LANDFALL_PROGRAM__FAILPOINTS", "--config", file)
	}
	require.NoError(t, cli.WriteClientConfig(p.state, cli.ClientConfig{
		Site: "local", Certificates: certify("cli", pki.UserIdentity("cli", pki.RoleAdmin)),
		Endpoints: map[string]string{scheduler: address[scheduler], orchestrator: address[orchestrator]},
	}))
	return p
}

// givenAddrs are the addresses that freeAddr has given.
var givenAddrs sync.Map

// freeAddr is a loopback address below the range from which the system takes ports of outgoing connections: nobody
// takes it by chance while its program is down.
func freeAddr(t testing.TB) string {
	for range 100 {
		address := "127.0.0.1:" + strconv.Itoa(10000+rand.IntN(20000))
		if _, given := givenAddrs.LoadOrStore(address, true); given { // to a program that does not listen yet
			continue
		}
		if l, err := net.Listen("tcp", address); err == nil {
			require.NoError(t, l.Close())
			return address
		}
	}
	t.Fatal("no free port")
	return ""
}

// startAll starts every program, and returns when the API answers.
func (p *product) startAll() {
	p.t.Helper()
	for _, name := range p.order {
		require.NoError(p.t, p.programs[name].start(""))
	}
	p.wait(90*time.Second, "the API answers", func(ctx context.Context) error {
		if p.api == nil {
			if err := p.dial(); err != nil {
				return err
			}
		}
		_, err := p.api.ListProtectedVms(ctx, &schedulerv1.ListProtectedVmsRequest{})
		return err
	})
}

func (p *product) killAll() {
	for _, name := range p.order {
		p.programs[name].kill()
	}
}

// dial makes the clients of the public API.
func (p *product) dial() error {
	var c cli.ClientConfig
	if err := readYAML(filepath.Join(p.state, cli.ClientFile), &c); err != nil {
		return err
	}
	if !filepath.IsAbs(c.Certificates) {
		c.Certificates = filepath.Join(p.state, c.Certificates)
	}
	id, err := rpc.LoadIdentity(c.Certificates, time.Now)
	if err != nil {
		return err
	}
	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: id, UnaryTimeout: 5 * time.Second})
	conn, err := dialer.Conn(c.Endpoints[scheduler], rpc.ExpectService(scheduler))
	if err != nil {
		return errors.Join(err, dialer.Close())
	}
	p.dialer, p.api, p.jobs = dialer, schedulerv1.NewProtectionServiceClient(conn), schedulerv1.NewJobServiceClient(conn)
	return nil
}

func readYAML(path string, out any) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return yaml.Unmarshal(raw, out)
}

// wait polls until f returns nil. It fails the test at the timeout, and at once when a program ended by itself.
func (p *product) wait(timeout time.Duration, what string, f func(ctx context.Context) error) {
	p.t.Helper()
	if err := p.poll(timeout, f); err != nil {
		require.NoError(p.t, err, what)
	}
}

func (p *product) poll(timeout time.Duration, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	start := time.Now()
	for {
		call, stop := context.WithTimeout(ctx, 10*time.Second)
		err := f(call)
		stop()
		if err == nil {
			return nil
		}
		for _, name := range p.order {
			if gone := p.programs[name].surprise(); gone != nil {
				return errors.Join(gone, err)
			}
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("gave up after %s: %w", time.Since(start).Round(time.Millisecond), err)
		case <-t.C:
		}
	}
}

// landfall runs one command line and decodes its JSON into out, if there is one.
func (p *product) landfall(ctx context.Context, out any, args ...string) error {
	args = append(args, "--state", p.state)
	if out != nil {
		args = append(args, "-o", "json")
	}
	var stdout, stderr bytes.Buffer
	if code := cli.Main(ctx, args, strings.NewReader(""), &stdout, &stderr); code != 0 {
		return fmt.Errorf("landfall %s: exit code %d\n%s%s", strings.Join(args, " "), code, stdout.String(), stderr.String())
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(stdout.Bytes(), out)
}

// uris tells where the guest finds its disks.
func (p *product) uris() []string {
	p.t.Helper()
	var uris []string
	p.wait(60*time.Second, "the machine is listed with its disks", func(ctx context.Context) error {
		r, err := p.api.ListVms(ctx, &schedulerv1.ListVmsRequest{})
		if err != nil {
			return err
		}
		for _, v := range r.Vms {
			if v.Machine.Id == machineID && len(v.Machine.Disks) == 2 && v.Machine.Disks[0].ExportUri != "" {
				uris = []string{v.Machine.Disks[0].ExportUri, v.Machine.Disks[1].ExportUri}
				return nil
			}
		}
		return errNotYet
	})
	return uris
}

// vm reads the record.
func (p *product) vm(ctx context.Context) (*schedulerv1.ProtectedVm, error) {
	r, err := p.api.GetProtectedVm(ctx, &schedulerv1.GetProtectedVmRequest{Vm: vmName})
	return r.GetVm(), err
}

// protect applies a policy of one second and protects the machine.
func (p *product) protect(ctx context.Context) {
	p.t.Helper()
	file := filepath.Join(p.dir, "policy.yaml")
	require.NoError(p.t, os.WriteFile(file, []byte("name: e2e\ncopy_interval: 1s\n"), 0o600))
	require.NoError(p.t, p.landfall(ctx, nil, "policy", "apply", "-f", file))
	require.NoError(p.t, p.landfall(ctx, nil, "protect", machineName, "--policy", "e2e", "--wait"))
}

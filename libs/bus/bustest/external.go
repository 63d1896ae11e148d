package bustest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// BinaryEnv names the environment variable with the path of a nats-server
// program.
const BinaryEnv = "LANDFALL_NATS_SERVER"

// External is a nats-server process with JetStream that synchronises every
// write, listening on loopback with mutual TLS.
type External struct {
	// URL and Monitor are the addresses of clients and of the monitoring endpoint.
	URL, Monitor string
	// Dir holds ca.pem, client.pem, client.key, and the same pair of a stranger
	// whom the server's CA did not sign.
	Dir string

	t      testing.TB
	binary string
	cmd    *exec.Cmd
	output *lockedBuffer
}

// StartExternal starts the program that LANDFALL_NATS_SERVER or the repository's
// .tools/bin has, and builds it from its module if neither does. Without CI=true
// a short test run is skipped rather than kept waiting for a build.
func StartExternal(t testing.TB) *External {
	t.Helper()
	e := &External{t: t, Dir: t.TempDir(), binary: binary(t), output: &lockedBuffer{}}
	client, monitor := testkit.FreeAddr(t), testkit.FreeAddr(t)
	e.URL, e.Monitor = "tls://"+client, "http://"+monitor
	e.certificates()
	conf := fmt.Sprintf(`
listen: %q
http: %q
server_name: landfall-test
tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }
jetstream { store_dir: %q, sync_interval: always, max_file_store: 64GB }
`, client, monitor, e.path("server.pem"), e.path("server.key"), e.path("ca.pem"), e.path("store"))
	require.NoError(t, os.WriteFile(e.path("nats.conf"), []byte(conf), 0o600))
	t.Cleanup(func() {
		e.Kill()
		if t.Failed() {
			t.Logf("nats-server:\n%s", e.output)
		}
	})
	e.Start()
	return e
}

func (e *External) path(name string) string { return filepath.ToSlash(filepath.Join(e.Dir, name)) }

// Options returns what connects to the server.
func (e *External) Options() bus.Options {
	return bus.Options{
		URL: e.URL, Name: "test", Logger: testkit.Logger(e.t),
		CAFile: e.path("ca.pem"), CertFile: e.path("client.pem"), KeyFile: e.path("client.key"),
	}
}

// Start runs the process and returns when it is healthy; for use after Kill, on
// the same ports and the same store.
func (e *External) Start() {
	e.t.Helper()
	e.cmd = exec.Command(e.binary, "-c", e.path("nats.conf"))
	e.cmd.Stdout, e.cmd.Stderr = e.output, e.output
	require.NoError(e.t, e.cmd.Start())
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	testkit.Eventually(e.t, 20*time.Second, func() error {
		req, err := http.NewRequestWithContext(testkit.Context(e.t), http.MethodGet, e.Monitor+"/healthz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("health: %s", resp.Status)
		}
		return nil
	}, "nats-server is healthy")
}

// Kill ends the process at once, as kill -9 does, and waits for its end.
func (e *External) Kill() {
	if e.cmd == nil {
		return
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
	e.cmd = nil
}

func binary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv(BinaryEnv); path != "" { //nolint:forbidigo // a test device, not configuration
		return path
	}
	dir, err := os.Getwd()
	require.NoError(t, err)
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.work")); err == nil {
			if path := filepath.Join(dir, ".tools", "bin", "nats-server"); exists(path) {
				return path
			}
		}
	}
	if testing.Short() && os.Getenv("CI") != "true" { //nolint:forbidigo // a test device, not configuration
		t.Skip("no nats-server program, and building one takes longer than a short test")
	}
	out := filepath.Join(t.TempDir(), "nats-server")
	ctx, cancel := context.WithDeadline(context.Background(), testkit.Deadline(t))
	defer cancel()
	text, err := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/nats-io/nats-server/v2").CombinedOutput()
	require.NoError(t, err, "build nats-server: %s", text)
	return out
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// certificates makes a CA with a server and a client, and a stranger of another CA.
func (e *External) certificates() {
	e.t.Helper()
	ca, caKey := e.issue("Landfall test CA", nil, nil)
	e.writePEM("ca.pem", "CERTIFICATE", ca.Raw)
	e.pair("server", ca, caKey)
	e.pair("client", ca, caKey)
	other, otherKey := e.issue("another CA", nil, nil)
	e.pair("stranger", other, otherKey)
}

func (e *External) pair(name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) {
	cert, key := e.issue(name, ca, caKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(e.t, err)
	e.writePEM(name+".pem", "CERTIFICATE", cert.Raw)
	e.writePEM(name+".key", "PRIVATE KEY", der)
}

func (e *External) writePEM(name, typ string, der []byte) {
	require.NoError(e.t, os.WriteFile(e.path(name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600))
}

func (e *External) issue(name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(e.t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	require.NoError(e.t, err)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, IsCA: ca == nil,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if ca == nil {
		ca, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
	require.NoError(e.t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(e.t, err)
	return cert, key
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

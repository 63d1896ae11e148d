package azure

import (
	"errors"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/config"
)

// Kinds of credentials.
const (
	// WorkloadIdentity is a federated token in a file, as Kubernetes projects it.
	WorkloadIdentity = "workload-identity"
	// ManagedIdentity is the identity of the Azure machine that the program runs on.
	ManagedIdentity = "managed-identity"
	// ClientCertificate is an application registration with a certificate: for hosts on premises.
	ClientCertificate = "client-certificate"
	// SAS is a shared access signature.
	SAS = "sas"
	// ConnectionString holds the account's key or a SAS.
	ConnectionString = "connection-string"
)

// Choices of Settings.Checksum.
const (
	ChecksumAuto  = "auto"
	ChecksumCRC64 = "crc64"
	ChecksumMD5   = "md5"
	ChecksumNone  = "none"
)

// Settings say how to reach a storage account and how hard to drive it. The zero value of a limit takes its default.
type Settings struct {
	Credential string `koanf:"credential" help:"workload-identity, managed-identity, client-certificate, sas or connection-string; empty takes the one that is given"`

	Tenant              string        `koanf:"tenant" help:"Entra tenant id; workload-identity and client-certificate"`
	Client              string        `koanf:"client" help:"application (client) id; for managed-identity that of a user-assigned one"`
	TokenFile           string        `koanf:"token_file" help:"file with the federated token of workload-identity; empty takes AZURE_FEDERATED_TOKEN_FILE"`
	Certificate         string        `koanf:"certificate" help:"PEM or PKCS#12 file with certificate and private key of client-certificate"`
	CertificatePassword config.Secret `koanf:"certificate_password" help:"password of the certificate file"`
	Authority           string        `koanf:"authority" help:"Entra endpoint, https://...; empty is the public cloud's"`
	SAS                 config.Secret `koanf:"sas" help:"query string of a shared access signature, or file:PATH"`
	ConnectionString    config.Secret `koanf:"connection_string" help:"connection string of the account, or file:PATH"`

	Proxy  string `koanf:"proxy" help:"http://host:port of a proxy, or none; empty takes it from the environment"`
	CAFile string `koanf:"ca_file" help:"PEM file of further certificate authorities to trust"`

	Concurrency     int             `koanf:"concurrency" help:"most requests in flight to the account; found by trial below that"`
	BlobConcurrency int             `koanf:"blob_concurrency" help:"most requests in flight to one blob"`
	PageRequests    int             `koanf:"page_requests" help:"requests/s to one page blob (Azure: 500); -1 is no limit"`
	PageBandwidth   config.ByteSize `koanf:"page_bandwidth" help:"bytes/s to one page blob (Azure: 60 MiB/s); 1B is no limit"`
	Checksum        string          `koanf:"checksum" help:"of uploads: auto, crc64, md5 or none; auto is crc64 where the service takes it, else md5 for block blobs"`
	RetryFor        time.Duration   `koanf:"retry_for" help:"how long one call is repeated when the service does not answer or is busy"`
	TryTimeout      time.Duration   `koanf:"try_timeout" help:"how long one try may take, besides the time of its bytes at min_rate"`
	MinRate         config.ByteSize `koanf:"min_rate" help:"slowest link that is accepted, bytes/s for one request"`
}

// DefaultSettings are right for a standard account; credentials have no default.
func DefaultSettings() Settings {
	return Settings{
		Concurrency: 64, BlobConcurrency: 16, PageRequests: 450, PageBandwidth: 60 * config.MiB, Checksum: ChecksumAuto,
		// 4 MiB at 128 KiB/s are 32 s: a try of it may take 62 s.
		RetryFor: 2 * time.Minute, TryTimeout: 30 * time.Second, MinRate: 128 * config.KiB,
	}
}

// withDefaults fills what is zero.
func (s Settings) withDefaults() Settings {
	d := DefaultSettings()
	for _, p := range []struct{ v, d *int }{
		{&s.Concurrency, &d.Concurrency}, {&s.BlobConcurrency, &d.BlobConcurrency}, {&s.PageRequests, &d.PageRequests},
	} {
		if *p.v == 0 {
			*p.v = *p.d
		}
	}
	for _, p := range []struct{ v, d *config.ByteSize }{{&s.PageBandwidth, &d.PageBandwidth}, {&s.MinRate, &d.MinRate}} {
		if *p.v == 0 {
			*p.v = *p.d
		}
	}
	for _, p := range []struct{ v, d *time.Duration }{{&s.RetryFor, &d.RetryFor}, {&s.TryTimeout, &d.TryTimeout}} {
		if *p.v == 0 {
			*p.v = *p.d
		}
	}
	if s.Checksum == "" {
		s.Checksum = d.Checksum
	}
	return s
}

// Kind is the credential chosen, or the one that is given when none is; "" is none.
func (s Settings) Kind() string {
	switch {
	case s.Credential != "":
		return s.Credential
	case s.ConnectionString.IsSet():
		return ConnectionString
	case s.SAS.IsSet():
		return SAS
	case s.Certificate != "":
		return ClientCertificate
	}
	return ""
}

// given reports whether Kubernetes' webhook for workload identity has set a variable, which the SDK then reads.
func given(variable string) bool {
	return os.Getenv(variable) != "" //nolint:forbidigo // Azure's own variables, not settings of ours
}

// Validate reports all problems that can be seen without knowing the account; see [Settings.ValidateURL] for the rest.
func (s Settings) Validate() error {
	var bad []error
	add := func(key, format string, args ...any) { bad = append(bad, config.Bad(key, format, args...)) }
	need := func(key, v string) {
		if v == "" {
			add(key, "must be set for %s", s.Credential)
		}
	}
	file := func(key, path string) {
		if path == "" {
			return
		}
		if st, err := os.Stat(path); err != nil {
			add(key, "%v", err)
		} else if !st.Mode().IsRegular() {
			add(key, "%s is no file", path)
		}
	}
	switch s.Credential {
	case "":
		if s.ConnectionString.IsSet() && s.SAS.IsSet() {
			add("credential", "both a SAS and a connection string are given: say which")
		}
	case WorkloadIdentity:
		if s.TokenFile != "" || !given("AZURE_FEDERATED_TOKEN_FILE") {
			need("token_file", s.TokenFile)
		}
		if !given("AZURE_TENANT_ID") {
			need("tenant", s.Tenant)
		}
		if !given("AZURE_CLIENT_ID") {
			need("client", s.Client)
		}
	case ManagedIdentity:
	case ClientCertificate:
		need("tenant", s.Tenant)
		need("client", s.Client)
		need("certificate", s.Certificate)
	case SAS:
		need("sas", s.SAS.Reveal())
	case ConnectionString:
		need("connection_string", s.ConnectionString.Reveal())
	default:
		add("credential", "%q is not one of workload-identity, managed-identity, client-certificate, sas, connection-string", s.Credential)
	}
	file("certificate", s.Certificate)
	file("ca_file", s.CAFile)
	if s.SAS.IsSet() {
		if q, err := url.ParseQuery(strings.TrimPrefix(s.SAS.Reveal(), "?")); err != nil || q.Get("sig") == "" {
			add("sas", "is no query string with a signature (sig=...)")
		}
	}
	if s.ConnectionString.IsSet() {
		if _, err := parseConnectionString(s.ConnectionString.Reveal()); err != nil {
			add("connection_string", "%v", err)
		}
	}
	if s.Authority != "" {
		if u, err := url.Parse(s.Authority); err != nil || u.Scheme != "https" || u.Host == "" {
			add("authority", "%q is no https:// address", s.Authority)
		}
	}
	if s.Proxy != "" && s.Proxy != "none" {
		if u, err := url.Parse(s.Proxy); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5" {
			add("proxy", "is no address like http://host:port")
		}
	}
	between := func(key string, v, lo, hi int64) {
		if v != 0 && (v < lo || v > hi) {
			add(key, "%d must be %d to %d", v, lo, hi)
		}
	}
	between("concurrency", int64(s.Concurrency), 1, 1024)
	between("blob_concurrency", int64(s.BlobConcurrency), 1, 256)
	if s.PageRequests != -1 {
		between("page_requests", int64(s.PageRequests), 10, 100_000)
	}
	if s.PageBandwidth != 1 {
		between("page_bandwidth", int64(s.PageBandwidth), 1<<20, 100<<30)
	}
	between("min_rate", int64(s.MinRate), 1<<10, 10<<30)
	switch s.Checksum {
	case "", ChecksumAuto, ChecksumCRC64, ChecksumMD5, ChecksumNone:
	default:
		add("checksum", "%q is not one of auto, crc64, md5, none", s.Checksum)
	}
	if s.RetryFor < 0 || s.RetryFor > time.Hour {
		add("retry_for", "%s must be at most 1h", s.RetryFor)
	}
	if s.TryTimeout != 0 && (s.TryTimeout < 100*time.Millisecond || s.TryTimeout > 10*time.Minute) {
		add("try_timeout", "%s must be 100ms to 10m", s.TryTimeout)
	}
	return errors.Join(bad...)
}

// ValidateURL reports what is wrong with an account's address, alone and together with the credential. The address is
// https://ACCOUNT.blob.core.windows.net, or http://HOST:PORT/ACCOUNT of an emulator; "" is right when a connection string
// names it.
func (s Settings) ValidateURL(account string) error {
	_, err := s.endpoint(account)
	return err
}

// endpoint returns the account's address and, from a connection string, its key or SAS.
func (s Settings) endpoint(account string) (connection, error) {
	var from connection
	if s.Kind() == ConnectionString {
		var err error
		if from, err = parseConnectionString(s.ConnectionString.Reveal()); err != nil {
			return from, config.Bad("azure.connection_string", "%v", err)
		}
	}
	if account == "" {
		if from.url == "" {
			return from, config.Bad("url", "must be set: https://ACCOUNT.blob.core.windows.net")
		}
		return from, from.check()
	}
	if s.Kind() == SAS {
		from.sas = strings.TrimPrefix(s.SAS.Reveal(), "?")
	}
	u, err := url.Parse(account)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return from, config.Bad("url", "is no address like https://ACCOUNT.blob.core.windows.net")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return from, config.Bad("url", "must hold no credentials and no query: a SAS goes to azure.sas")
	case strings.Count(strings.Trim(u.Path, "/"), "/") > 0:
		return from, config.Bad("url", "names more than an account: containers are Landfall's own")
	}
	given := strings.TrimRight(account, "/")
	switch kind := s.Kind(); {
	case kind == ConnectionString && !strings.EqualFold(given, from.url):
		return from, config.Bad("url", "%s is not the account of the connection string, %s", given, from.url)
	case kind == "":
		return from, config.Bad("azure.credential", "must be set: workload-identity, managed-identity, client-certificate, sas or connection-string")
	case kind != SAS && kind != ConnectionString && u.Scheme == "http":
		return from, config.Bad("url", "%s cannot be used over plain http: the SDK refuses to send a token without TLS; use https, or a connection string or SAS for an emulator", kind)
	}
	from.url = given
	return from, from.check()
}

// connection is what a connection string says.
type connection struct {
	url     string // of the blob service, without a slash at its end
	account string
	key     string // base64; "" is none
	sas     string
}

// check refuses to show a signature to everybody on the way. A key does not travel.
func (c connection) check() error {
	u, err := url.Parse(c.url)
	if err != nil || u.Scheme != "http" || c.key != "" {
		return nil
	}
	if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return config.Bad("url", "a SAS over plain http can be used by whoever sees it on the way: use https, or for an emulator elsewhere its key")
}

// parseConnectionString reads one. Errors name keys, never values.
func parseConnectionString(text string) (connection, error) {
	fields := map[string]string{}
	for part := range strings.SplitSeq(text, ";") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		k, v, ok := strings.Cut(part, "=")
		if !ok {
			return connection{}, errors.New("want Key=Value;Key=Value;...")
		}
		fields[strings.ToLower(k)] = v
	}
	c := connection{
		url: strings.TrimRight(fields["blobendpoint"], "/"), account: fields["accountname"], key: fields["accountkey"],
		sas: strings.TrimPrefix(fields["sharedaccesssignature"], "?"),
	}
	if c.url == "" {
		if c.account == "" {
			return c, errors.New("has neither BlobEndpoint nor AccountName")
		}
		scheme, suffix := fields["defaultendpointsprotocol"], fields["endpointsuffix"]
		if scheme == "" {
			scheme = "https"
		}
		if suffix == "" {
			suffix = "core.windows.net"
		}
		c.url = scheme + "://" + c.account + ".blob." + suffix
	}
	switch {
	case c.key == "" && c.sas == "":
		return c, errors.New("has neither AccountKey nor SharedAccessSignature")
	case c.key != "" && c.account == "":
		return c, errors.New("has AccountKey without AccountName")
	}
	if u, err := url.Parse(c.url); err != nil || u.Host == "" {
		return c, errors.New("BlobEndpoint is no address")
	}
	return c, nil
}

#!/usr/bin/env bash
# Builds the training image and pushes it to Amazon ECR. Progress goes to standard error; the last line on standard
# output is the image's URI with its digest:  image_uri=$(./build_and_push.sh --region us-west-2)
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: build_and_push.sh [options]

Builds the training image and pushes it to Amazon ECR, into a repository that is created when it is missing.
The last line on standard output is the image's URI with its digest.

  --region REGION         AWS region (default: AWS_REGION, AWS_DEFAULT_REGION, or the profile's)
  --profile PROFILE       AWS profile (default: AWS_PROFILE, or the default credentials)
  --repository NAME       ECR repository (default: dreambooth-sm)
  --tag TAG               tag beside the git revision and `latest` (default: the package's version)
  --base-image IMAGE      base image instead of the Dockerfile's
  --build-arg NAME=VALUE  build argument of the Dockerfile, such as WITH_XFORMERS=1; may be repeated
  --dry-run               print what would be done, and call neither AWS nor Docker
  --help                  print this text
USAGE
}

say() { echo "build_and_push: $*" >&2; }
fail() { say "error: $*"; exit 1; }

# attempt WHAT COMMAND...: runs the command; a failure becomes one line, WHAT with the command's last line of error.
attempt() {
  local what=$1 error
  shift
  # The command keeps its standard output; its standard error is captured by way of descriptor 3.
  { error=$("$@" 2>&1 >&3 3>&-) || fail "$what: $(grep -v '^[[:space:]]*$' <<<"$error" | tail -n 1)"; } 3>&1
}

region=${AWS_REGION:-${AWS_DEFAULT_REGION:-}}
repository=dreambooth-sm
tag=
dry_run=
build_args=()
while (($#)); do
  case $1 in
    --region | --profile | --repository | --tag | --base-image | --build-arg)
      [[ -n ${2-} ]] || fail "$1 needs a value"
      case $1 in
        --region) region=$2 ;;
        --profile) export AWS_PROFILE=$2 ;;
        --repository) repository=$2 ;;
        --tag) tag=$2 ;;
        --base-image) build_args+=(--build-arg "BASE_IMAGE=$2") ;;
        --build-arg) build_args+=(--build-arg "$2") ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "unknown option '$1'; --help lists the options" ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' dreambooth_sm/__init__.py)
# Outside of a git checkout the image goes without a revision.
revision=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || true)
tag=${tag:-$version}
tags=("$tag" ${revision:+"$revision"} latest)
build=(docker build --platform linux/amd64 ${build_args[@]+"${build_args[@]}"}
  --build-arg "VERSION=$version" --build-arg "REVISION=${revision:-unknown}")
# SageMaker takes plain Docker manifests only: attestations would wrap the image in an OCI index.
export DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1

if [[ $dry_run ]]; then
  echo "would create the ECR repository '$repository' in ${region:-the configured region} if it is missing"
  echo "would build: ${build[*]} ."
  echo "would push it with the tags: ${tags[*]}"
  exit
fi

for tool in docker aws; do
  command -v "$tool" >/dev/null || fail "'$tool' is not installed, or not on PATH"
done
attempt "Docker is not running, or not yours to use" docker version >/dev/null
region=${region:-$(aws configure get region || true)}
[[ $region ]] || fail "no AWS region: pass --region, or set one with 'aws configure'"
export AWS_REGION=$region AWS_DEFAULT_REGION=$region
account=$(attempt "no valid AWS credentials" aws sts get-caller-identity --query Account --output text)
say "account $account, region $region"

# ECR itself names the repository's host, so no partition's domain has to be known here.
describe=(aws ecr describe-repositories --repository-names "$repository" --query 'repositories[0].repositoryUri' --output text)
if ! uri=$(attempt "cannot read the ECR repository '$repository'" "${describe[@]}" 2>&1); then
  [[ $uri == *RepositoryNotFoundException* ]] || { echo "$uri" >&2 && exit 1; }
  say "creating the ECR repository '$repository'"
  uri=$(attempt "cannot create the ECR repository '$repository'" \
    aws ecr create-repository --repository-name "$repository" --image-scanning-configuration scanOnPush=true \
    --query repository.repositoryUri --output text)
  # Each push leaves the image that it replaces without a tag.
  attempt "cannot set the lifecycle rule of '$repository'" \
    aws ecr put-lifecycle-policy --repository-name "$repository" --lifecycle-policy-text '{"rules": [{
      "rulePriority": 1, "description": "expire images that lost their tags",
      "selection": {"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": 14},
      "action": {"type": "expire"}}]}' >/dev/null
fi

password=$(attempt "cannot get a login for ECR" aws ecr get-login-password)
attempt "cannot log Docker in to ${uri%%/*}" \
  docker login --username AWS --password-stdin "${uri%%/*}" <<<"$password" >/dev/null

"${build[@]}" "${tags[@]/#/--tag=$uri:}" . >&2 || fail "the build failed; its own messages are above"
for each in "${tags[@]}"; do
  say "pushing $uri:$each"
  attempt "cannot push $uri:$each" docker push "$uri:$each" >&2
done

pushed=$(attempt "cannot read the digest of $uri:$tag" aws ecr describe-images --repository-name "$repository" \
  --image-ids "imageTag=$tag" --query 'imageDetails[0].[imageDigest,imageManifestMediaType]' --output text)
read -r digest media_type <<<"$pushed"
[[ $media_type != *vnd.oci* ]] || say "warning: stored as $media_type, which SageMaker may refuse;" \
  "turn off Docker's containerd image store and push again"
echo "$uri@$digest"
